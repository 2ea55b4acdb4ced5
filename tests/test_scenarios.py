"""Scenarios against decisions made by hand: every kind of threshold, both readings, pools of one class."""

import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from hclib.evaluation.metrics import MetricError, image_metrics, pixel_metrics
from hclib.evaluation.scenarios import diff_ratio, evaluate, evaluate_rules, scenario_table
from hclib.evaluation.thresholds import best_f1_threshold

SIZE = 8


@dataclass
class FakeScores:
    """What `evaluate` asks of Scores; maps are patches repeated, so that pixels can be checked by hand."""

    patch: np.ndarray
    image: np.ndarray
    group: np.ndarray

    def subset(self, rows):
        return FakeScores(self.patch[rows], self.image[rows], self.group[rows])

    def upsample(self, size):
        k = size // self.patch.shape[1]
        return np.repeat(np.repeat(self.patch, k, axis=1), k, axis=2)


def case(seed=0, scales=(1.0, 3.0, 10.0), n=24, groups=None):
    """Categories on different scales, half of the images anomalous in one patch each."""
    rng = np.random.default_rng(seed)
    total = n * len(scales)
    labels = np.tile(np.arange(n) % 2, len(scales))
    patch = np.abs(rng.standard_normal((total, 4, 4))).astype(np.float32)
    masks = np.zeros((total, SIZE, SIZE), bool)
    for i in np.flatnonzero(labels):
        y, x = rng.integers(0, 4, 2)
        patch[i, y, x] += 2.5
        masks[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = True
    patch *= np.repeat(scales, n).astype(np.float32)[:, None, None]
    names = np.repeat([f"c{i}" for i in range(len(scales))], n)
    index = pd.DataFrame(
        {
            "path": [f"{name}/{i}.png" for i, name in enumerate(names)],
            "mask_path": "",
            "category": names,
            "split": "test",
            "label": labels,
            "defect": np.where(labels, "spot", "good"),
        }
    )
    own = np.repeat(np.arange(len(scales)), n)
    return FakeScores(patch, patch.max((1, 2)), own if groups is None else np.asarray(groups)), index, masks


def f1(labels, hit):
    tp, wrong = (hit & labels).sum(), (hit != labels).sum()
    return 2 * tp / (2 * tp + wrong)


def row(frame, category, level="image"):
    return frame.set_index(["category", "level"]).loc[(category, level)]


def test_class_thresholds_give_the_plain_metrics_of_each_category():
    scores, index, masks = case()
    frame = evaluate(scores, index, size=SIZE, masks=masks)
    assert list(zip(frame.category, frame.level, strict=True)) == [
        (c, level) for level in ("image", "pixel") for c in ("c0", "c1", "c2", "mean")
    ]
    for name in ("c0", "c1", "c2"):
        rows = (index.category == name).to_numpy()
        image = image_metrics(index.label[rows], scores.image[rows])
        pixel = pixel_metrics(masks[rows], scores.upsample(SIZE)[rows])
        for level, want in (("image", image), ("pixel", pixel)):
            got = row(frame, name, level)
            assert {k: got[k] for k in want} == want
            assert got.f1 == got.f1_max
        assert (row(frame, name).n_normal, row(frame, name).n_anomalous) == (12, 12)
        assert row(frame, name, "pixel").n_anomalous == masks[rows].sum()
    mean = row(frame, "mean")
    assert mean.f1 == pytest.approx(frame.query("level == 'image'").f1[:3].mean())
    assert np.isnan(mean.threshold) and np.isnan(mean.aupro)
    assert set(frame.chosen_on) == {"test labels"} and set(frame.thresholds) == {"class"}
    assert set(frame.reason) == {""}


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_global_threshold_is_the_best_for_all_samples_together(level):
    scores, index, masks = case()
    frame = evaluate(scores, index, "global", size=SIZE, masks=masks)
    if level == "image":
        truth, values, owner = index.label.to_numpy(bool), scores.image, index.category.to_numpy()
    else:
        truth, values = masks.ravel(), scores.upsample(SIZE).ravel()
        owner = np.repeat(index.category.to_numpy(), SIZE * SIZE)
    threshold = best_f1_threshold(truth, values)
    for name in ("c0", "c1", "c2"):
        mine, got = owner == name, row(frame, name, level)
        assert got.threshold == threshold
        assert got.f1 == pytest.approx(f1(truth[mine], values[mine] >= threshold), abs=1e-15)
        assert got.f1 <= got.f1_max
        assert (got.tp, got.fp) == (
            (truth & mine & (values >= threshold)).sum(),
            (~truth & mine & (values >= threshold)).sum(),
        )
    assert row(frame, "mean", level).threshold == threshold


def test_groups_equal_to_classes_are_class_thresholds_and_one_group_is_the_global():
    scores, index, masks = case()
    options = {"size": SIZE, "masks": masks}
    numbers = ["f1", "threshold", "auroc", "ap", "f1_max", "aupro", "iou_max", "tp", "fp"]
    by_class = evaluate(scores, index, "class", **options)
    pd.testing.assert_frame_equal(evaluate(scores, index, "group", **options)[numbers], by_class[numbers])
    one = replace(scores, group=np.full(len(index), -1))
    everything = evaluate(one, index, "global", **options)
    pd.testing.assert_frame_equal(evaluate(one, index, "group", **options)[numbers], everything[numbers])
    assert row(by_class, "mean").f1 > row(everything, "mean").f1 + 0.05  # scales differ: this is the paper's gap


def test_several_rules_at_once_are_each_alone():
    scores, index, masks = case(groups=np.random.default_rng(7).integers(0, 3, 72))
    rules = [("class", "class"), ("global", "class"), ("group", "class"), ("group", "cluster")]
    together = evaluate_rules(scores, index, rules, size=SIZE, masks=masks)
    for (thresholds, aggregate), frame in zip(rules, together, strict=True):
        alone = evaluate(scores, index, thresholds, aggregate=aggregate, size=SIZE, masks=masks)
        pd.testing.assert_frame_equal(frame, alone, check_exact=True)
    with pytest.raises(MetricError, match="aggregate='cluster'"):
        evaluate_rules(scores, index, [("class", "class"), ("global", "cluster")])


def test_both_readings_of_group_thresholds_by_hand():
    groups = np.repeat([0, 0, 1], 24)
    groups[3], groups[60] = 1, 0  # routed astray
    scores, index, masks = case(groups=groups)
    truth, cut = index.label.to_numpy(bool), np.empty(len(index))
    for g in (0, 1):
        cut[groups == g] = best_f1_threshold(truth[groups == g], scores.image[groups == g])
    hit = scores.image >= cut
    pooled = evaluate(scores, index, "group", pixel=False)
    for name in ("c0", "c1", "c2"):
        mine = (index.category == name).to_numpy()
        assert row(pooled, name).f1 == pytest.approx(f1(truth[mine], hit[mine]), abs=1e-15)
    assert row(pooled, "c0").groups == 2 and np.isnan(row(pooled, "c0").threshold)
    assert row(pooled, "c1").groups == 1 and row(pooled, "c1").threshold == cut[30]
    macro = evaluate(scores, index, "group", pixel=False, aggregate="cluster")
    assert macro.category.tolist() == ["group 0", "group 1", "mean"]
    for g in (0, 1):
        mine = groups == g
        assert row(macro, f"group {g}").f1 == pytest.approx(f1(truth[mine], hit[mine]), abs=1e-15)
    assert row(macro, "mean").f1 == pytest.approx(macro.f1[:2].mean())
    assert row(macro, "mean").f1 != pytest.approx(row(pooled, "mean").f1, abs=1e-6)


def test_a_group_without_anomalies_raises_no_alarm_and_says_so():
    groups = np.repeat([0, 1, 2], 24)
    groups[[0, 2]] = 3  # two normal images of c0, on their own
    scores, index, masks = case(groups=groups)
    scores.image[0] = 1e6
    frame = evaluate(scores, index, "group", pixel=False)
    assert row(frame, "c0").reason == "group 3: no anomalous sample among 2"
    assert row(frame, "c0").fp == evaluate(*keep(scores, index, groups != 3), "group", pixel=False).fp[0]
    macro = evaluate(scores, index, "group", pixel=False, aggregate="cluster")
    lone = row(macro, "group 3")
    assert lone.threshold == float("inf") and np.isnan(lone.f1) and lone.fp == 0
    assert row(macro, "mean").f1 == pytest.approx(macro.f1[:3].mean())
    assert row(macro, "mean").reason == "undefined values left out of the mean: group 3"


def keep(scores, index, rows):
    return scores.subset(np.flatnonzero(rows)), index[rows].reset_index(drop=True)


def test_a_group_of_anomalies_alone_is_called_anomalous():
    groups = np.repeat([0, 1, 2], 24)
    groups[[1, 3]] = 3
    scores, index, masks = case(groups=groups)
    macro = row(evaluate(scores, index, "group", pixel=False, aggregate="cluster"), "group 3")
    assert (macro.f1, macro.threshold) == (1.0, min(scores.image[[1, 3]]))
    assert np.isnan(macro.auroc) and macro.reason == "no normal sample among 2"


def test_a_category_of_one_class_keeps_its_row_and_leaves_the_mean():
    scores, index, masks = case()
    scores, index = keep(scores, index, ~((index.category == "c1") & (index.label == 1)).to_numpy())
    frame = evaluate(scores, index, "global", pixel=False)
    c1 = row(frame, "c1")
    assert np.isnan(c1.f1) and np.isnan(c1.auroc) and c1.reason == "no anomalous sample among 12"
    assert c1.fp == (scores.image[(index.category == "c1").to_numpy()] >= c1.threshold).sum()
    assert row(frame, "mean").auroc == pytest.approx(frame.auroc[[0, 2]].mean())
    assert "c1" in row(frame, "mean").reason


def test_masks_are_read_from_the_index_and_missing_ones_left_out(tmp_path):
    from PIL import Image

    scores, index, masks = case()
    for i in np.flatnonzero(index.label):
        Image.fromarray(masks[i].astype(np.uint8) * 255).save(tmp_path / f"{i}.png")
        index.loc[i, "mask_path"] = str(tmp_path / f"{i}.png")
    numbers = ["f1", "threshold", "auroc", "ap", "f1_max", "aupro", "iou_max", "n_normal", "n_anomalous"]
    given = evaluate(scores, index, size=SIZE, masks=masks)
    read = evaluate(scores, index, size=SIZE)
    pd.testing.assert_frame_equal(read[numbers], given[numbers])
    index.loc[[1, 3], "mask_path"] = ""
    frame = evaluate(scores, index, size=SIZE)
    assert row(frame, "c0", "pixel").reason == "2 anomalous images without a mask left out"
    assert row(frame, "c0", "pixel").n_normal == 22 * SIZE * SIZE - masks[:24].sum() + masks[[1, 3]].sum()
    assert row(frame, "c0").n_anomalous == 12
    index["mask_path"] = ""
    none = row(evaluate(scores, index, size=SIZE), "c0", "pixel")
    assert np.isnan(none.aupro) and none.reason.startswith("12 anomalous images without a mask left out; no anomalous")


def test_diff_ratio_is_that_of_the_means():
    scores, index, masks = case()
    known, unknown = evaluate(scores, index, pixel=False), evaluate(scores, index, "global", pixel=False)
    frame = diff_ratio(known, unknown).set_index("category")
    assert frame.diff_ratio["mean"] == pytest.approx(unknown.f1[3] / known.f1[3])
    assert frame.diff_ratio["c0"] == pytest.approx(unknown.f1[0] / known.f1[0])
    macro = evaluate(scores, index, "group", pixel=False, aggregate="cluster")
    assert diff_ratio(known, macro).category.tolist() == ["mean"]
    with pytest.raises(MetricError, match="several rows"):
        diff_ratio(pd.concat([known, known]), unknown)
    with pytest.raises(MetricError, match="share no category"):
        diff_ratio(known[:1], unknown[1:])


def test_four_scenarios_in_one_table():
    scores, index, masks = case()
    noisy = replace(scores, image=scores.image + np.float32(0.5) * (np.arange(len(index)) % 5 == 0))
    runs = {"U->U": noisy, "K->K": scores, "U->K": noisy, "K->U": scores}
    frame = scenario_table(runs, index, unknown="global", size=SIZE, masks=masks)
    assert frame.scenario.drop_duplicates().tolist() == ["K->K", "K->U", "U->K", "U->U"]
    assert len(frame) == 4 * 8
    got = frame.set_index(["scenario", "category", "level"])
    known, unknown = evaluate(noisy, index, pixel=False), evaluate(noisy, index, "global", pixel=False)
    assert got.f1["U->K", "mean", "image"] == known.f1.iloc[-1]
    assert got.f1["U->U", "mean", "image"] == unknown.f1.iloc[-1]
    assert got.diff_ratio["U->U", "mean", "image"] == unknown.f1.iloc[-1] / known.f1.iloc[-1]
    assert np.isnan(got.diff_ratio["U->K", "mean", "image"])
    assert (got.training["K->U", "c0", "pixel"], got.evaluation["K->U", "c0", "pixel"]) == (
        "known",
        "unknown",
    )
    assert set(frame.query("evaluation == 'unknown'").thresholds) == {"global"}
    alone = scenario_table({"U->U": noisy}, index, aggregate="cluster", pixel=False)
    assert alone.diff_ratio.isna().all() and "group 0" in set(alone.category)
    with pytest.raises(MetricError, match="U->X"):
        scenario_table({"U->X": scores}, index)


def test_rows_in_any_order_give_the_same_frame():
    scores, index, masks = case(groups=np.random.default_rng(7).integers(0, 3, 72))
    turn = np.random.default_rng(8).permutation(len(index))
    base = evaluate(scores, index, "group", size=SIZE, masks=masks)
    other = evaluate(
        scores.subset(turn), index.iloc[turn].reset_index(drop=True), "group", size=SIZE, masks=masks[turn]
    )
    pd.testing.assert_frame_equal(base, other, rtol=1e-12)


def test_bad_input_is_named():
    scores, index, masks = case()
    with pytest.raises(MetricError, match="unknown thresholds 'best'"):
        evaluate(scores, index, "best")
    with pytest.raises(MetricError, match="aggregate='cluster', thresholds='class'"):
        evaluate(scores, index, aggregate="cluster")
    with pytest.raises(MetricError, match="has 72 rows, the index 71"):
        evaluate(scores, index[:-1])
    with pytest.raises(MetricError, match="lacks the columns label"):
        evaluate(scores, index.drop(columns="label"))
    with pytest.raises(MetricError, match="masks has shape"):
        evaluate(scores, index, size=SIZE, masks=masks[:, :4])
    scores.patch[5, 1, 1] = np.nan
    with pytest.raises(MetricError, match=r"scores.patch of c0/5.png \(row 5\)"):
        evaluate(scores, index, size=SIZE, masks=masks)
    with pytest.raises(MetricError, match="no rows"):
        evaluate(scores, index[:0])


def test_scores_of_the_kernels_room_fit():
    maps = pytest.importorskip("hclib.kernels.maps")
    fake, index, masks = case()
    scores = maps.Scores(patch=fake.patch, image=fake.image, group=fake.group)
    frame = evaluate(scores, index, "group", size=SIZE, masks=masks)
    assert row(frame, "c1", "pixel").auroc == pytest.approx(
        pixel_metrics(masks[24:48], scores.subset(np.arange(24, 48)).upsample(SIZE))["auroc"]
    )


def test_pixels_are_streamed():
    scores, index, masks = case(n=80, scales=(1.0, 2.0, 3.0, 4.0))
    size = 128
    masks = np.repeat(np.repeat(masks, 16, 1), 16, 2)
    tracemalloc.start()
    evaluate(scores, index, "global", size=size, masks=masks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 4 * masks.size  # bytes: less than five float32 copies of all maps, workings included
