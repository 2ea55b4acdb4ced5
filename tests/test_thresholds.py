"""Oracle thresholds against a loop over all; label-free thresholds against their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.evaluation.metrics import MetricError, image_metrics, pixel_metrics, rank
from hclib.evaluation.thresholds import (
    best_f1,
    best_f1_threshold,
    best_pixel_f1_threshold,
    f1_at,
    normal_threshold,
    normal_thresholds,
    pixel_f1_at,
)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_threshold_beats_the_best(pairs):
    labels, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], np.float32)
    best = best_f1_threshold(labels, scores)
    if not labels.any():
        assert best == float("inf") and np.isnan(f1_at(labels, scores, best))
        return
    top = f1_at(labels, scores, best)
    grid = np.arange(-3.5, 4, 0.5)
    assert top == max(f1_at(labels, scores, t) for t in grid)
    assert all(f1_at(labels, scores, t) < top for t in grid if t > best)  # of equal ones the highest
    if not labels.all():
        assert (best, top) == (
            image_metrics(labels, scores)["threshold"],
            image_metrics(labels, scores)["f1_max"],
        )


def test_pools_of_one_class():
    assert best_f1(rank([1, 1], [3.0, 2.0])) == (2.0, 1.0)
    threshold, f1 = best_f1(rank([0, 0], [3.0, 2.0]))
    assert threshold == float("inf") and np.isnan(f1)
    assert f1_at([1, 1], [3.0, 2.0], 2.5) == 2 / 3


def test_pixel_thresholds_stream():
    rng = np.random.default_rng(0)
    masks = rng.random((7, 16, 16)) < 0.2
    maps = (rng.standard_normal(masks.shape) + masks).astype(np.float32)

    def chunks():
        return ((masks[i : i + 3], maps[i : i + 3]) for i in range(0, 7, 3))

    whole = pixel_metrics(masks, maps)
    threshold = best_pixel_f1_threshold(chunks())
    assert (threshold, pixel_f1_at(chunks(), threshold)) == (whole["threshold"], whole["f1_max"])
    assert pixel_f1_at(chunks(), np.inf) == 0
    assert np.isnan(pixel_f1_at([(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))], 1.0))


@given(st.lists(st.floats(0, 50, width=32), min_size=1, max_size=60), st.floats(0.01, 1))
@settings(max_examples=200, deadline=None)
def test_quantile_bounds_the_false_alarms(scores, quantile):
    scores = np.array(scores, np.float32)
    threshold = normal_threshold(scores, quantile=quantile)
    assert (scores >= threshold).sum() <= (1 - quantile) * len(scores) + 1e-6
    below = scores[scores < threshold].max()  # never empty: the limit itself counts as normal
    assert (scores >= below).sum() > (1 - quantile) * len(scores) - 1e-6  # and no lower score would do


def test_robust_threshold_is_median_and_mads():
    scores = np.array([1, 2, 3, 4, 100], np.float32)  # median 3, deviations 2 1 0 1 97, MAD 1
    assert normal_threshold(scores, k=2) == pytest.approx(5, rel=1e-6)
    assert normal_threshold(scores) == pytest.approx(7.5, rel=1e-6)
    assert normal_threshold(scores, k=2) > 5  # a score equal to the limit is normal
    spoilt = np.array([1, 2, 3, 4, 1e6], np.float32)
    assert normal_threshold(spoilt) == normal_threshold(scores)


def test_robust_threshold_of_normal_scores_is_three_standard_deviations():
    scores = np.random.default_rng(1).normal(10, 2, 20_000)
    assert normal_threshold(scores) == pytest.approx(16, abs=0.2)
    assert (scores >= normal_threshold(scores)).mean() < 0.003


@pytest.mark.parametrize("options", [{}, {"k": 0}, {"quantile": 1.0}, {"quantile": 0.5}])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 3e30])
def test_constant_scores_raise_no_alarm(options, value):
    for dtype in (np.float32, np.float64):
        scores = np.full(9, value, dtype)
        assert not (scores >= normal_threshold(scores, **options)).any()


def test_thresholds_per_group_fall_back_on_all():
    scores = np.concatenate([np.linspace(1, 2, 20), np.linspace(10, 20, 20), [500.0]])
    groups = np.array([0] * 20 + [1] * 20 + [7])
    found = normal_thresholds(scores, groups, quantile=1.0)
    assert found[0] == pytest.approx(2) and found[1] == pytest.approx(20)
    assert found[7] == found[-1] == pytest.approx(500)
    assert list(found) == [-1, 0, 1, 7]


def test_bad_options_are_named():
    with pytest.raises(MetricError, match="no normal scores"):
        normal_threshold([])
    with pytest.raises(MetricError, match="row 1"):
        normal_threshold([1.0, np.nan])
    with pytest.raises(MetricError, match="quantile is 0"):
        normal_threshold([1.0], quantile=0)
    with pytest.raises(MetricError, match="k is -1"):
        normal_threshold([1.0], k=-1)
    with pytest.raises(MetricError, match="give one of them"):
        normal_threshold([1.0], quantile=0.9, k=3)
    with pytest.raises(MetricError, match="one group for each score"):
        normal_thresholds([1.0, 2.0], [0])
