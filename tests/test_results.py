"""Results on disk: decisions give the F1 of the metrics, files are whole, other people's files stay."""

import json

import numpy as np
import pandas as pd
import pytest

from hclib.evaluation.results import FILES, decide, save_results
from hclib.evaluation.scenarios import evaluate
from hclib.kernels.maps import Scores


def run(seed=0):
    rng = np.random.default_rng(seed)
    label = np.tile([0, 0, 1], 12)
    group = np.repeat([0, 1, 1], 12)
    patch = (rng.random((36, 4, 4)) + 0.4 * label[:, None, None] + group[:, None, None]).astype(np.float32)
    index = pd.DataFrame(
        {
            "path": [f"image{i}.png" for i in range(36)],
            "mask_path": "",
            "category": np.repeat(["bolt", "nut", "tile"], 12),
            "split": "test",
            "label": label,
            "defect": np.where(label, "scratch", "good"),
        }
    )
    return Scores(patch, patch.max((1, 2)), group), index


@pytest.mark.parametrize("kind", ["class", "global", "group"])
def test_decisions_have_the_f1_that_the_metrics_report(kind):
    scores, index = run()
    table = decide(scores, index, [kind])
    rows = evaluate(scores, index, kind, pixel=False).set_index("category")["f1"]
    for category, part in table.groupby("category"):
        hit = (part[f"{kind} decision"] * part["label"]).sum()
        f1 = 2 * hit / (part[f"{kind} decision"].sum() + part["label"].sum())
        assert f1 == pytest.approx(rows[category])


def test_files_are_written_whole_and_replaced_whole(tmp_path):
    scores, index = run()
    options = {"config": {"method": "HierCore", "seed": 0}, "timing": {"fit_seconds": 1.5}, "pixel": False}
    rules = [("class", "class"), ("group", "class"), ("group", "cluster")]
    for _ in range(2):
        folder = save_results(tmp_path / "a" / "run", scores, index, rules=rules, **options)
        assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert json.loads((folder / "config.json").read_text()) == {"method": "HierCore", "seed": 0}
    assert json.loads((folder / "timing.json").read_text()) == {"fit_seconds": 1.5}
    decisions, metrics = (pd.read_csv(folder / name) for name in ("decisions.csv", "metrics.csv"))
    assert {"class decision", "group decision", "group threshold"} <= set(decisions) and len(decisions) == 36
    assert set(metrics["aggregate"]) == {"class", "cluster"} and "mean" in set(metrics["category"])


def test_a_pool_of_one_kind_gets_no_threshold_and_no_alarm():
    scores, index = run()
    index.loc[index["category"] == "bolt", "label"] = 0
    bolt = decide(scores, index, ["class"]).query("category == 'bolt'")
    assert bolt["class threshold"].isna().all() and (bolt["class decision"] == 0).all()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    scores, index = run()
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        save_results(tmp_path, scores, index, config={}, timing={}, pixel=False)
    assert (tmp_path / "thesis.txt").read_text() == "keep me"
