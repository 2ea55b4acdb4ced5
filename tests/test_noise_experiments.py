"""The contamination chapter's experiments on fabricated features: what they hand to detectors, and what they count."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_contamination import make_index

from hclib.book import noise_ablation, noise_experiments, noise_overlap, noise_tables, noise_twins
from hclib.book.noise_distances import gaussian_sets, pair_distances
from hclib.book.noise_experiments import common_rows, noise_run, noisy_features, reduce_channels, sweep_configs
from hclib.book.noise_protocols import protocol_table
from hclib.book.noise_semantic import one_class_split
from hclib.book.noise_synthesis import blob, paste
from hclib.kernels.features import Features

BASE = {"dataset": "made", "encoder": "fake", "image_size": 56, "size": 28}


@pytest.fixture
def made(monkeypatch):
    """Features of a small index, two layers; anomalous images have one foreign patch, and masks to match."""
    index = make_index([20], [(8, 8)], test_normals=10)
    rng = np.random.default_rng(0)
    maps = {name: rng.normal(size=(len(index), 4, 4, 6)).astype(np.float32) for name in ("block6", "block9")}
    bad = np.flatnonzero(index["label"] == 1)
    maps["block9"][bad, 1, 2] += rng.normal(size=(len(bad), 6)) * 8
    features = Features(maps, rng.normal(size=(len(index), 5)).astype(np.float32), index, {"image_size": 56})

    def masks(frame, size):
        result = np.zeros((len(frame), 4, 4), bool)
        result[(frame["label"] == 1).to_numpy(), 1, 2] = True
        return np.repeat(np.repeat(result, size // 4, 1), size // 4, 2)

    monkeypatch.setattr(noise_experiments, "dataset_features", lambda *_: features)
    monkeypatch.setattr(noise_twins, "dataset_features", lambda *_: features)
    monkeypatch.setattr(noise_experiments, "read_masks", masks)
    monkeypatch.setattr("hclib.images.read_masks", masks)
    return features


def test_contaminated_features_are_those_of_the_same_images(made):
    config = {**BASE, "layers": ["block9"], "noise": {"ratio": 0.2, "overlap": False}}
    train, test, manifest = noisy_features(config)
    assert list(train.maps) == ["block9"] and len(train) == 24 and len(test) == 22
    where = {path: row for row, path in enumerate(made.index["path"])}
    for part in (train, test):
        rows = [where[path] for path in part.index["path"]]
        np.testing.assert_array_equal(np.asarray(part.maps["block9"]), made.maps["block9"][rows])
    assert (manifest["path"] != "").sum() == 4 == (train.index["label"] == 1).sum()


def test_all_components_are_a_rotation_and_fewer_shorten(made):
    train, test, _ = noisy_features({**BASE})
    joined = np.concatenate([np.asarray(test.maps[k]) for k in test.maps], -1).reshape(-1, 12)
    whole, few = (reduce_channels(train, test, count)[1] for count in (12, 5))
    points = [
        torch.from_numpy(np.asarray(x.reshape(-1, x.shape[-1]), np.float64))
        for x in (joined, whole.maps["pca12"], few.maps["pca5"])
    ]
    before, same, shorter = (torch.cdist(p, p) for p in points)
    torch.testing.assert_close(same, before, rtol=1e-3, atol=1e-3)
    assert (shorter <= before + 1e-3).all()
    assert whole.encoder["variance_kept"] == 1 and 0.3 < few.encoder["variance_kept"] < 1


def test_common_images_are_the_largest_ratios_test_set(made):
    noise = {"definition": "per_normal", "overlap": False, "seed": 3}
    kept = None
    for ratio in (0, 0.1, 0.4):
        config = {**BASE, "noise": {**noise, "ratio": ratio}, "common": 0.4}
        _, test, _ = noisy_features(config)
        rows = set(test.index["path"][common_rows(config, test.index)])
        assert kept is None or rows == kept
        kept = rows
    assert kept == set(test.index["path"])


@pytest.mark.parametrize(("method", "epochs"), [("PatchCore", ["last"]), ("FunAD", ["last", "test"])])
def test_a_run_measures_both_test_sets_and_epochs(made, method, epochs):
    options = (
        {"ratio": 0.5, "patch_size": 1} if method == "PatchCore" else {"epochs": 3, "hidden": [8], "refresh": None}
    )
    config = {**BASE, "method": method, "options": options, "seed": 0, "common": 0.4, "layers": ["block9"]}
    rows = noise_run({**config, "noise": {"ratio": 0.2, "overlap": False, "seed": 0}})
    assert set(map(tuple, rows[["epoch", "test_set"]].drop_duplicates().to_numpy())) == {
        (epoch, part) for epoch in epochs for part in ("own", "common")
    }
    own = rows.query("test_set == 'own' and level == 'image' and category == 'mean'")
    assert set(own["n_anomalous"]) == {12} and set(rows["train_anomalous"]) == {4}
    assert set(rows.query("test_set == 'common' and level == 'image'")["n_anomalous"]) == {8}
    if method == "FunAD":
        history = noise_tables.training_history(rows.assign(**{"noise.ratio": 0.2, "method": "FunAD", "seed": 0}))
        assert history["epoch"].tolist() == [0, 1, 2] and history["criterion"].between(0, 1).all()


def test_a_sweep_takes_the_first_seed_first_and_reduces_for_banks_alone():
    base = {**BASE, "components": 8, "noise": {"overlap": False}}
    configs = sweep_configs(base, {"PatchCore": {}, "FunAD": {"epochs": 1}}, [0, 0.2], [0, 1])
    assert [(c["seed"], c["noise"]["ratio"], c["method"]) for c in configs[:4]] == [
        (0, 0, "PatchCore"),
        (0, 0, "FunAD"),
        (0, 0.2, "PatchCore"),
        (0, 0.2, "FunAD"),
    ]
    assert all(("components" in c) == (c["method"] == "PatchCore") and c["common"] == 0.2 for c in configs)
    assert all(c["noise"]["seed"] == c["seed"] for c in configs)


def test_pairs_are_counted_once():
    normal, anomalous = gaussian_sets(30, 4, 0)
    found = pair_distances(normal, anomalous[:7])
    assert [len(found[kind]) for kind in ("NN", "AN", "AA")] == [435, 210, 21]
    expected = [float((a - b).norm()) for i, a in enumerate(anomalous[:7]) for b in anomalous[i + 1 : 7]]
    np.testing.assert_allclose(np.sort(found["AA"]), np.sort(expected), rtol=1e-4)
    assert np.median(found["AN"]) > np.median(found["NN"])


def test_one_class_is_normal_and_a_few_others_are_mixed_in(made):
    index = pd.concat([made.index.assign(category=name) for name in "abc"], ignore_index=True)
    index = index.assign(label=0, path=[f"{i}.png" for i in range(len(index))])
    features = Features({"t": np.zeros((len(index), 1, 1, 2))}, np.zeros((len(index), 2)), index, {})
    train, test = one_class_split(features, "b", 0.1, seed=0)
    assert train.index["label"].tolist().count(1) == 2 and (train.index["category"] == "b").sum() == 20
    assert (train.index["split"] == "train").all() and (test.index["split"] == "test").all()
    assert ((test.index["category"] != "b") == (test.index["label"] == 1)).all()


def test_protocols_differ_as_their_papers_say():
    table = protocol_table(make_index([40, 40], [(12, 12), (3, 3)]), 0.1, 0).astype(float)
    assert table["injected"].tolist() == [8, 8, 8, 8, 30]
    assert table["of them trained on"].tolist() == [8, 8, 0, 0, 30]
    assert table["categories that ran out"].tolist() == [0, 0, 0, 0, 2]


def test_a_synthetic_anomaly_changes_its_blob_and_nothing_else():
    generator = np.random.default_rng(3)
    base, donor = (generator.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(2))
    mask = blob(generator)
    assert 0 < mask.mean() <= 0.12
    pasted = paste(base, donor, mask, generator)
    np.testing.assert_array_equal(pasted[~mask], base[~mask])
    assert (pasted[mask] != base[mask]).mean() > 0.9


@pytest.mark.parametrize(("steps", "images", "epochs"), [(100, 31, 100), (100, 33, 50), (100, 256, 13), (0, 31, 0)])
def test_every_category_gets_the_steps_at_least(steps, images, epochs):
    assert noise_overlap.epochs_for(steps, images) == epochs


def test_the_clean_run_stands_in_both_settings():
    rows = pd.DataFrame({"noise.ratio": [0, 0.2, 0.2], "noise.overlap": [False, False, True], "auroc": [0.9, 0.8, 0.5]})
    found = noise_overlap.with_clean(rows).set_index(["noise.overlap", "noise.ratio"])["auroc"]
    assert found.to_dict() == {(False, 0): 0.9, (True, 0): 0.9, (False, 0.2): 0.8, (True, 0.2): 0.5}


@pytest.mark.parametrize(("precision", "verdict"), [(0.6, "Holds"), (0.1, "Does not hold")])
def test_pseudo_labels_are_judged_where_there_is_noise(tmp_path, monkeypatch, precision, verdict):
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path))
    history = pd.DataFrame(
        {"noise": [0, 0, 10, 10], "epoch": [0, 1, 0, 1], "precision": [0, 0, 1 - precision, precision]}
    )
    base = {"profile": "demo", "dataset": "made", "encoder": "fake", "image_size": 56}
    text = noise_tables.label_verdict(history, {0: 0, 10: 0.02}, base, "31_noise_sweep_mtd").data
    assert text.startswith(f"**{verdict}.**") and f"{precision:.1%}" in text and "2.0%" in text


def test_a_guess_hits_the_share_of_masked_training_pixels(made, monkeypatch):
    monkeypatch.setattr(noise_tables, "read_masks", noise_experiments.read_masks)
    share = noise_tables.anomalous_share(made.index, 0.2, 0, 28)
    assert share == pytest.approx(4 / 24 / 16)


def tiles():
    """Two regions of three exposures, one of one, and an image whose name says nothing."""
    names = [
        "exp1_num_10",
        "exp2_num_25",
        "exp3_num_41",
        "exp1_num_50",
        "exp3_num_62",
        "exp4_num_70",
        "exp2_num_99",
        "x",
    ]
    rows = [(f"{n}.jpg", "", "tile", "test", 1, "break") for n in names]
    rows += [(f"exp{k}_num_{k + 100}.jpg", "", "tile", "train", 0, "good") for k in range(1, 7)]
    return pd.DataFrame(rows, columns=["path", "mask_path", "category", "split", "label", "defect"])


def test_exposures_of_a_region_are_found_by_their_names():
    found = noise_twins.regions(tiles())
    groups = [list(part.index) for _, part in found.groupby(found)]
    assert sorted(groups) == [[0, 1, 2], [3, 4, 5], [6], [7], [8, 9, 10, 11, 12, 13]]
    shuffled = tiles().sample(frac=1, random_state=0)
    again = noise_twins.regions(shuffled)
    assert sorted(sorted(part.index) for _, part in again.groupby(again)) == sorted(groups)


def test_a_twin_is_counted_where_another_image_of_its_region_was_injected():
    table = noise_twins.twin_counts(tiles(), [0, 1 / 6], 0)
    assert table["injected"].tolist() == [0, 1] and table["left to test"].tolist() == [8, 7]
    moved, touched = noise_twins.injected(tiles(), {"ratio": 1 / 6, "overlap": False, "seed": 0})
    region = noise_twins.regions(tiles())
    assert touched[moved].all() and set(region[touched]) == set(region[moved])
    assert table["of them with a twin"].tolist() == [0, int(touched.sum()) - 1]


def test_test_images_with_a_twin_are_measured_apart(made):
    config = {**BASE, "method": "PatchCore", "options": {"ratio": 0.5, "patch_size": 1}, "seed": 0, "against": 0.2}
    noise = {"overlap": False, "seed": 0}
    clean, noisy = (noise_twins.twin_run({**config, "noise": {**noise, "ratio": r}}) for r in (0, 0.2))
    for rows in (clean, noisy):  # these images have no names that tell regions: nothing that is left has a twin
        counts = rows.query("level == 'image' and category == 'mean'").set_index("twins")["n_anomalous"]
        assert counts.fillna(0).tolist() == [0, 12]


@pytest.mark.parametrize(
    ("gain", "spread", "seeds", "verdict"),
    [(3, 0.5, 3, "Holds"), (-3, 0.5, 3, "Does not hold"), (1, 4, 3, "Not decided"), (3, 0, 1, "Not decided")],
)
def test_a_difference_within_the_spread_over_seeds_decides_nothing(tmp_path, monkeypatch, gain, spread, seeds, verdict):
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path))
    rows = []
    for seed in range(seeds):
        for level in ("image", "pixel"):
            shift = spread / 100 * (seed - 1)
            shared = {"level": level, "seed": seed, "n_normal": 9, "n_anomalous": 5}
            for value in (0, 1, 2.5):
                auroc = 0.8 + gain / 100 * (value == 2.5) + shift
                rows.append({**shared, "study": "smoothness", "options.smoothness": value, "auroc": auroc})
            for value in (False, True):
                auroc = 0.8 + gain / 100 * value + shift
                rows.append({**shared, "study": "y_syn", "options.synthetic_labels": value, "auroc": auroc})
            rows.append({**shared, "study": "memory", "options.memory_ratio": 0.5, "auroc": 0.8 + shift})
    results = pd.DataFrame(rows).assign(category="mean", test_set="own", epoch="last")
    base = {"profile": "demo", "dataset": "made", "encoder": "fake", "image_size": 56}
    weight, share, labels = noise_ablation.ablation_verdicts(results, base, "34_funad_ablation")
    assert weight.data.startswith(f"**{verdict}.**") and labels.data.startswith(f"**{verdict}.**")
    assert share.data.startswith("**Holds.**")
