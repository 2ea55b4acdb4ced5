"""MeDS's trainings as Records: what is drawn and injected, how a ranking is measured, what the tables say of it."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hclib.book import meds_review_tables, meds_run_tables, meds_runs
from hclib.evaluation import records
from hclib.kernels.features import Features

STUDENT = {"width": 16, "depth": 2, "tokens": 8, "steps": 6, "batch_size": 4}
MEDS = {"memory_layers": ["block9"], "distill_steps": 4, "ensembles": 5}
BASE = {"profile": "demo", "dataset": "demo", "encoder": "fake", "image_size": 224, "size": 16}
BASE |= {"train_images": 6, "test_normal": 4, "test_anomalous": 3, "draw_seed": 0}


@pytest.fixture
def products(tmp_path, monkeypatch):
    """Two products of smooth patches; the defect is a foreign patch, masked in a file of its own."""
    from PIL import Image

    rng, rows, maps = np.random.default_rng(0), [], []
    for category, centre in (("a", 1.0), ("b", -1.0)):
        for part, label, count in (("train", 0, 8), ("test", 0, 5), ("test", 1, 6)):
            for number in range(count):
                name = tmp_path / f"{category}_{part}_{label}_{number}.png"
                grid = rng.normal(size=(4, 4, 8)) * 0.2 + centre
                mask = np.zeros((4, 4), np.uint8)
                if label:
                    grid[1, 2], mask[1, 2] = rng.normal(size=8) * 3, 255
                Image.fromarray(mask).resize((16, 16), Image.Resampling.NEAREST).save(name)
                row = {"path": str(name), "mask_path": str(name) if label else "", "category": category, "split": part}
                rows.append({**row, "label": label, "defect": "foreign" if label else "good"})
                maps.append(grid.astype(np.float16))
    index = pd.DataFrame(rows).sort_values(["category", "split", "label", "path"], kind="stable")
    maps, tokens = np.stack(maps)[index.index], rng.normal(size=(len(rows), 8)).astype(np.float32)
    index = index.reset_index(drop=True)
    features = Features({"block6": maps, "block9": maps}, tokens, index, {"name": "fake"})
    monkeypatch.setattr(meds_runs, "features_of", lambda config: features)
    monkeypatch.setattr(meds_runs, "cache_dir", lambda: tmp_path)
    return features


def noisy(ratio, setting, seed=0):
    return meds_runs.runs(BASE, [setting], [ratio], [seed])[0]


def test_a_run_draws_the_same_part_of_every_category_and_injects_into_it(products):
    config = noisy(0.5, meds_runs.alone(STUDENT))
    drawn = meds_runs.drawn_set(config).index
    counts = drawn.groupby(["category", "split", "label"]).size()
    assert counts.tolist() == [4, 3, 6, 4, 3, 6]
    pd.testing.assert_frame_equal(drawn, meds_runs.drawn_set({**config, "noise": {}, "seed": 7}).index)
    train, test, facts = meds_runs.contaminated(config)
    assert facts["train_normal"] == 12 and facts["train_anomalous"] == 6 and facts["realised_per_normal"] == 0.5
    assert set(train.index["path"][train.index["label"] == 1]) <= set(test.index["path"])  # overlap
    assert len(test) == 14 and set(train.index["path"]) | set(test.index["path"]) == set(drawn["path"])
    every = meds_runs.drawn_set({**config, "train_images": 0, "test_normal": 0, "test_anomalous": 0})
    assert len(every) == len(products)


@pytest.mark.parametrize("setting", [meds_runs.alone(STUDENT), meds_runs.with_meds(STUDENT, MEDS)])
def test_a_run_measures_test_set_seen_and_unseen_anomalies_and_the_review(products, setting):
    config = noisy(1 / 3, setting)
    rows = meds_runs.meds_run(config)
    image = rows.query("level == 'image' and category == 'a'").set_index("test_set")
    assert image["n_anomalous"].to_dict() == {"all": 3, "seen": 2, "unseen": 1}
    assert (image["n_normal"] == 4).all()
    parts = image.loc["seen", "auroc"] * 2 + image.loc["unseen", "auroc"]
    assert image.loc["all", "auroc"] == pytest.approx(parts / 3)
    review = rows.query("level == 'review' and category == 'mean'")["stage"].tolist()
    assert review == (["own"] if setting["method"] == "StudentDetector" else ["memory", "distilled", "final"])
    assert rows["history_stage"].notna().sum() == 1 and rows["history_step"].iloc[0][0] == 0
    again = meds_runs.meds_run(config).drop(columns=["fit_seconds", "score_seconds"])  # from the checkpoints
    pd.testing.assert_frame_equal(rows[again.columns], again)


def test_a_clean_run_has_no_review_and_a_memory_none_of_the_history(products):
    rows = meds_runs.meds_run(noisy(0, meds_runs.memory_alone(MEDS)))
    assert not (rows["level"] == "review").any() and not any(name.startswith("history") for name in rows)
    assert rows.query("category == 'mean' and test_set == 'unseen'")["auroc"].notna().all()


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=3, max_size=30))
def test_inspection_depth_is_the_longest_prefix_a_reviewer_must_read(pairs):
    scores, labels = np.array([s for s, _ in pairs], float), np.array([int(b) for _, b in pairs])
    if not 0 < labels.sum() < len(labels):
        return
    index = pd.DataFrame({"category": "a", "label": labels})
    row = meds_runs.review_metrics(index, scores).iloc[0]
    order = sorted(range(len(labels)), key=lambda i: (-scores[i], labels[i]))  # of equal scores the normal ones first
    last = max(place for place, i in enumerate(order, 1) if labels[i])
    assert row["depth"] == pytest.approx(last / len(labels)) and row["depth"] >= row["least_depth"]


def test_a_perfect_ranking_has_the_least_depth_and_a_reversed_one_reads_everything():
    index = pd.DataFrame({"category": ["a"] * 4 + ["b"] * 4, "label": [0, 0, 0, 1] * 2})
    good = meds_runs.review_metrics(index, np.array([1, 2, 3, 9, 10, 20, 30, 90.0])).set_index("category")
    assert (good["auprc"] == 1).all() and (good["depth"] == 0.25).all()  # excess makes the products comparable
    bad = meds_runs.review_metrics(index, np.array([4, 3, 2, 1, 40, 30, 20, 10.0])).set_index("category")
    assert (bad["depth"] == 1).all() and bad.loc["mean", "auprc"] == 0.25


def test_the_six_rows_of_the_ablation_differ_in_what_they_say(products):
    rows = meds_runs.ablation(STUDENT, MEDS)
    hashes = {records.config_hash(noisy(0.5, setting)) for setting in rows.values()}
    assert len(rows) == len(hashes) == 6 and rows["Distilled model"]["options"]["selection"] is False
    assert "labels" not in rows["Baseline"] and rows["Memory ensemble"]["options"] == {
        "memory_layers": ["block9"],
        "ensembles": 5,
    }


def recorded(config):
    """Return a run's rows with its config, as they come back from the store."""
    rows = meds_runs.meds_run(config)
    flat = {f"{key}.{k}": v for key in ("noise", "options") for k, v in config.get(key, {}).items()}
    flat |= {key: config[key] for key in ("method", "seed")}
    return rows.assign(**{k: [v] * len(rows) for k, v in flat.items()})


@pytest.fixture
def sweep(products):
    settings = [meds_runs.alone(STUDENT), meds_runs.with_meds(STUDENT, MEDS)]
    return pd.concat([recorded(c) for c in meds_runs.runs(BASE, settings, [0, 0.5], [0])], ignore_index=True)


def test_tables_have_the_papers_layout_and_losses_are_differences(sweep):
    table = meds_run_tables.noise_table(sweep, ("P-AUPRO", "P-AP"))
    names = ["Dinomaly", "Dinomaly + MeDS"]
    assert list(table.index) == [(metric, name) for metric in ("P-AUPRO", "P-AP") for name in names]
    assert list(table.columns) == ["0 %", "50 %"]
    losses = meds_run_tables.losses(sweep)
    values = meds_run_tables.measured(sweep).query("name == 'Dinomaly' and metric == 'I-AP'").set_index("noise")
    wanted = values.loc[0, "value"] - values.loc[0.5, "value"]
    assert losses.loc["Dinomaly", ("I-AP", "lost")] == pytest.approx(wanted)
    kinds = meds_run_tables.seen_table(sweep)
    assert kinds.loc[("Dinomaly", "in training too"), "0 %"] == ""


def test_the_selection_counts_what_it_keeps(sweep):
    rows = meds_review_tables.selection_rows(sweep)
    first = rows[(rows["noise"] == 0.5) & (rows["step"] == 0)].iloc[0]
    assert first["kept"] == 1 and first["precision"] == first["start"] == pytest.approx(2 / 3)
    later = rows[(rows["noise"] == 0.5) & (rows["step"] > 0)].iloc[-1]
    assert later["kept"] * 18 == pytest.approx(round(later["kept"] * 18)) and later["kept"] < 1
    assert (rows[rows["noise"] == 0]["precision"] == 1).all()


def test_verdicts_follow_the_numbers(sweep, monkeypatch):
    said = {}
    monkeypatch.setattr(
        meds_run_tables.report, "claim", lambda name, statement, holds, evidence, **rest: said.update({name: holds})
    )

    def loses(points, steps=1000):  # the value of the student alone under noise, so many points below its clean one
        rows = sweep.assign(**{"options.steps": steps})
        image = (rows["level"] == "image") & (rows["test_set"] == "all") & (rows["category"] == "mean")
        rows.loc[image, "auroc"] = 0.9
        rows.loc[image & (rows["method"] == "StudentDetector") & (rows["noise.ratio"] > 0), "auroc"] -= points / 100
        return rows

    meds_run_tables.noise_verdicts(loses(8), {"profile": "demo"}, "page")
    assert said == {"dinomaly-breaks": True, "dinomaly-meds-holds": True, "dinomaly-meds-clean": True}
    meds_run_tables.noise_verdicts(loses(3), {"profile": "demo"}, "page")
    assert said["dinomaly-breaks"] is False and said["dinomaly-meds-holds"] is None  # nothing to withstand
    meds_run_tables.noise_verdicts(loses(3, steps=100), {"profile": "demo"}, "page")
    assert said["dinomaly-breaks"] is None  # too short a training


def test_the_review_names_every_training_image_once(products):
    config = noisy(0.5, meds_runs.with_meds(STUDENT, MEDS))
    train = meds_runs.contaminated(config)[0].index
    review = meds_review_tables.with_paths(meds_runs.reviewed(config), train)
    assert sorted(review["path"]) == sorted(train["path"]) and (review["excess"].diff().dropna() <= 0).all()
    found = meds_review_tables.found_table(review)
    assert found.loc["100 %", "images looked at"] == review.loc[review["label"] == 1, "rank"].max()
    counts = meds_review_tables.selected_by_category(review)
    assert counts["normal images"].tolist() == [6, 6] and counts["anomalous images"].tolist() == [3, 3]


def test_an_option_at_its_default_is_no_other_run():
    assert meds_runs.varied(MEDS, "k", 1.0) == MEDS and meds_runs.varied(MEDS, "ratio", 0.1) == MEDS
    assert meds_runs.varied(MEDS, "k", 3.0) == {**MEDS, "k": 3.0}
    assert meds_runs.varied(MEDS, "distill_steps", 4) == MEDS and meds_runs.varied(MEDS, "ensembles", 100) != MEDS
