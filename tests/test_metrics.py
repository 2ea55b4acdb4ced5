"""Metrics against brute force over every threshold, scikit-learn and formulas; ties, one class, memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label as label_regions
from sklearn.metrics import average_precision_score, roc_auc_score

from hclib.evaluation import metrics
from hclib.evaluation.metrics import MetricError, image_metrics, mad, pixel_metrics


def brute_decisions(labels, scores):
    """Best (F1, highest threshold reaching it) and best IoU over every distinct score."""
    best, iou = (-1.0, None), 0.0
    for t in sorted(set(scores.tolist()), reverse=True):
        hit = scores >= t
        tp, fp, fn = (hit & labels).sum(), (hit & ~labels).sum(), (~hit & labels).sum()
        f1 = 2 * tp / (2 * tp + fp + fn)
        best = (f1, t) if f1 > best[0] else best
        iou = max(iou, tp / (tp + fp + fn))
    return best, iou


def brute_aupro(masks, maps, limit):
    """Area under mean region overlap over the false-positive rate, one loop over every distinct score."""
    regions = [(i, r) for i, m in enumerate(masks) for r in range(1, label_regions(m, connectivity=2).max() + 1)]
    numbered = [label_regions(m, connectivity=2) for m in masks]
    points = [(0.0, 0.0)]
    for t in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= t
        fpr = (hit & ~masks).sum() / (~masks).sum()
        pro = np.mean([hit[i][numbered[i] == r].mean() for i, r in regions])
        points.append((fpr, pro))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


def pixel_case(rng, n=3, size=9, levels=None, share=0.25):
    masks = rng.random((n, size, size)) < share
    maps = rng.standard_normal((n, size, size)) + masks
    maps = np.round(maps * levels) / levels if levels else maps
    return masks, maps.astype(np.float32)


samples = st.lists(st.tuples(st.booleans(), st.integers(-4, 4)), min_size=2, max_size=40).filter(
    lambda pairs: 0 < sum(label for label, _ in pairs) < len(pairs)
)


@given(samples)
@settings(max_examples=200, deadline=None)
def test_image_metrics_equal_brute_force_and_sklearn_with_ties(pairs):
    labels, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float32)
    found = image_metrics(labels, scores)
    (f1, threshold), _ = brute_decisions(labels, scores)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    assert (found["f1_max"], found["threshold"]) == (f1, threshold)
    assert list(found) == ["auroc", "ap", "f1_max", "threshold"]
    assert all(type(value) is float for value in found.values())


def test_image_metrics_golden_values():
    # three anomalies ranked 1st, 2nd, 4th of five: AUROC 5/6, AP (1 + 1 + 3/4) / 3, F1 at the 4th 6/7
    found = image_metrics([1, 1, 0, 1, 0], [5, 4, 3, 2, 1])
    assert found == {
        "auroc": 5 / 6,
        "ap": pytest.approx((1 + 1 + 3 / 4) / 3),
        "f1_max": 6 / 7,
        "threshold": 2.0,
    }
    assert image_metrics([0, 1, 0, 1], [1, 1, 1, 1])["auroc"] == 0.5  # all tied: chance, and said by the numbers
    assert image_metrics([0, 1, 0, 1], [1, 1, 1, 1])["f1_max"] == 2 / 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_reported_threshold_attains_f1_exactly_in_the_dtype_of_the_scores(dtype):
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    scores = (rng.random(300) + 0.2 * labels).astype(dtype)
    found = image_metrics(labels, scores)
    hit = scores >= found["threshold"]
    tp, wrong = (hit & labels).sum(), (hit != labels).sum()
    assert 2 * tp / (2 * tp + wrong) == found["f1_max"]


def test_order_of_rows_and_monotone_maps_of_scores_change_nothing():
    rng = np.random.default_rng(1)
    labels, scores = rng.random(200) < 0.4, rng.integers(0, 50, 200).astype(np.float32)
    base, turn = image_metrics(labels, scores), rng.permutation(200)
    assert image_metrics(labels[turn], scores[turn]) == base
    doubled = image_metrics(labels, 2 * scores - 70)
    assert {**doubled, "threshold": 0} == {**base, "threshold": 0}
    flipped = image_metrics(~labels, -scores)
    assert flipped["auroc"] == pytest.approx(base["auroc"], abs=1e-15)
    assert image_metrics(labels, -scores)["auroc"] == pytest.approx(1 - base["auroc"], abs=1e-15)


@pytest.mark.parametrize(
    ("labels", "says"), [([0, 0], "no anomalous sample among 2"), ([1, 1], "no normal"), ([], "no samples")]
)
def test_single_class_gives_nan_with_a_reason(labels, says):
    found = image_metrics(np.array(labels, bool), np.arange(len(labels), dtype=float))
    assert says in found.pop("reason")
    assert all(np.isnan(value) for value in found.values())
    masks = np.array(labels, bool).reshape(-1, 1, 1)
    found = pixel_metrics(masks, masks.astype(np.float32))
    assert says in found.pop("reason")
    assert all(np.isnan(value) for value in found.values())


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_pixel_metrics_equal_brute_force_over_every_threshold(levels, limit):
    masks, maps = pixel_case(np.random.default_rng(2), levels=levels)
    found = pixel_metrics(masks, maps, fpr_limit=limit)
    flat, scores = masks.ravel(), maps.ravel()
    (f1, threshold), iou = brute_decisions(flat, scores)
    assert found["aupro"] == pytest.approx(brute_aupro(masks, maps, limit), abs=1e-12)
    assert found["auroc"] == pytest.approx(roc_auc_score(flat, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(flat, scores), abs=1e-12)
    assert (found["f1_max"], found["threshold"]) == (f1, threshold)
    assert found["iou_max"] == iou
    assert found["f1_max"] == pytest.approx(2 * iou / (1 + iou))  # one is a monotone function of the other
    assert list(found) == ["auroc", "ap", "f1_max", "iou_max", "aupro", "threshold"]
    assert all(type(value) is float for value in found.values())


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5]), st.floats(0.02, 1.0))
@settings(max_examples=40, deadline=None)
def test_aupro_equals_brute_force_on_random_cases(seed, levels, limit):
    masks, maps = pixel_case(np.random.default_rng(seed), n=2, size=6, levels=levels)
    if masks.any() and not masks.all():
        assert pixel_metrics(masks, maps, limit)["aupro"] == pytest.approx(brute_aupro(masks, maps, limit), abs=1e-12)


def test_aupro_golden_values():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 3, 2:4] = True  # a region of one pixel and one of two
    perfect = masks.astype(np.float32)
    assert pixel_metrics(masks, perfect)["aupro"] == 1.0
    assert pixel_metrics(masks, 1 - perfect)["aupro"] == 0.0
    # constant maps: overlap equals the false-positive rate, its mean below the limit is half the limit
    assert pixel_metrics(masks, np.zeros((1, 4, 4)), 0.3)["aupro"] == pytest.approx(0.15)
    # only the small region found, nothing else above any normal pixel: overlap 1/2 throughout
    small = np.zeros((1, 4, 4), np.float32)
    small[0, 0, 0], small[0, 3, 2:4] = 1, -1
    assert pixel_metrics(masks, small)["aupro"] == pytest.approx(0.5)


def test_regions_touching_at_a_corner_are_one():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 1, 2] = True
    maps = np.zeros((1, 4, 4), np.float32)
    maps[0, 0, 0] = 2
    maps[0, 1, 1:3] = -1
    assert pixel_metrics(masks, maps)["aupro"] == pytest.approx(1 / 3)  # as two regions it would be 1/2


def test_a_shifted_map_is_noticed():
    masks, maps = pixel_case(np.random.default_rng(3), levels=8)
    base = pixel_metrics(masks, maps)
    moved = pixel_metrics(masks, np.roll(maps, 1, axis=2))
    assert all(abs(base[key] - moved[key]) > 1e-3 for key in ("auroc", "ap", "f1_max", "iou_max", "aupro"))


def test_blocks_and_chunks_change_no_count(monkeypatch):
    masks, maps = pixel_case(np.random.default_rng(4), n=5, levels=16)
    whole = pixel_metrics(masks, maps)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    blocked = pixel_metrics(masks, maps)
    chunked = metrics.summarise(metrics.rank_pixels((masks[i : i + 2], maps[i : i + 2]) for i in range(0, 5, 2)))
    pooled = metrics.summarise(
        metrics.pool([metrics.rank_pixels([(masks[:3], maps[:3])]), metrics.rank_pixels([(masks[3:], maps[3:])])])
    )
    for other in (blocked, chunked, pooled):
        assert other == pytest.approx(whole, abs=1e-12)
        assert (other["auroc"], other["f1_max"], other["threshold"]) == (
            whole["auroc"],
            whole["f1_max"],
            whole["threshold"],
        )


@pytest.mark.parametrize("block", [1, 100])
def test_of_equal_f1_the_highest_threshold_is_reported(monkeypatch, block):
    monkeypatch.setattr(metrics, "_BLOCK", block)
    found = image_metrics([1, 0, 0, 1], [4, 3, 2, 1])  # F1 is 2/3 at 4 and again at 1
    assert (found["f1_max"], found["threshold"]) == (2 / 3, 4.0)


@given(samples, st.floats(-6, 6))
@settings(max_examples=100, deadline=None)
def test_confusion_counts_what_the_rule_says(pairs, threshold):
    labels, scores = np.array([p[0] for p in pairs]), np.array([p[1] / 3 for p in pairs], np.float32)
    hit = scores.astype(np.float64) >= threshold
    assert metrics.confusion(metrics.rank(labels, scores), threshold) == (
        (hit & labels).sum(),
        (hit & ~labels).sum(),
    )


def test_confusion_edges():
    ranking = metrics.rank([0, 1], np.array([1.0, 2.0], np.float32))
    assert metrics.confusion(ranking, float("inf")) == (0, 0)
    assert metrics.confusion(ranking, float("-inf")) == (1, 1)
    assert metrics.confusion(ranking, 1e300) == (0, 0)
    assert metrics.confusion(ranking, 1 + 1e-12) == (
        1,
        0,
    )  # float32 would round the threshold down to the score 1
    with pytest.raises(MetricError, match="NaN"):
        metrics.confusion(ranking, float("nan"))


def test_bad_input_is_named():
    with pytest.raises(MetricError, match=r"scores\[1\] is nan \(row 1\)"):
        image_metrics([0, 1], [1.0, np.nan])
    maps = np.zeros((3, 2, 2), np.float32)
    maps[2, 1, 0] = np.inf
    with pytest.raises(MetricError, match=r"maps\[2, 1, 0\] is inf \(row 2\)"):
        pixel_metrics(np.ones((3, 2, 2), bool), maps)
    with pytest.raises(MetricError, match=r"maps\[3, 1, 0\]"):
        metrics.rank_pixels([(np.ones((1, 2, 2), bool), maps[:1]), (np.ones((3, 2, 2), bool), maps)])
    with pytest.raises(MetricError, match=r"labels has shape \(3,\) but the scores have \(2,\)"):
        image_metrics([0, 1, 1], [1.0, 2.0])
    with pytest.raises(MetricError, match=r"labels\[1\] is 2"):
        image_metrics([0, 2], [1.0, 2.0])
    with pytest.raises(MetricError, match="binarise"):
        pixel_metrics(np.full((1, 2, 2), 255), np.zeros((1, 2, 2)))
    with pytest.raises(MetricError, match=r"shape \(2, 2\)"):
        pixel_metrics(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(MetricError, match="fpr_limit"):
        pixel_metrics(np.eye(2)[None], np.zeros((1, 2, 2)), fpr_limit=0)


def test_mad_kinds():
    image = {"auroc": 0.9, "ap": 0.8, "f1_max": 0.7}
    pixel = {"auroc": 0.6, "ap": 0.5, "f1_max": 0.4, "aupro": 0.3, "iou_max": 0.2}
    both = {"image": image, "pixel": pixel}
    assert mad(image) == mad(both, "I") == pytest.approx(0.8)
    assert mad(pixel, "P") == mad(both, "P") == pytest.approx(0.4)
    assert mad(both, "hiercore8") == pytest.approx((2.4 + 2.0) / 8)
    assert mad(both, "ader7") == pytest.approx((2.4 + 1.8) / 7)
    assert np.isnan(mad({**image, "ap": float("nan")}))
    with pytest.raises(MetricError, match="aupro"):
        mad({"image": image, "pixel": image}, "ader7")
    with pytest.raises(MetricError, match="unknown mAD kind"):
        mad(image, "mean")


def test_a_benchmark_category_stays_within_a_few_hundred_megabytes():
    rng = np.random.default_rng(5)
    masks = np.zeros((200, 256, 256), bool)
    masks[:120, 60:130, 50:120] = True
    maps = rng.standard_normal(masks.shape, dtype=np.float32)
    maps[masks] += 1
    tracemalloc.start()
    found = pixel_metrics(masks, maps)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert 0.7 < found["auroc"] < 0.8
    assert peak < 250  # MB beside masks (13) and maps (52)
