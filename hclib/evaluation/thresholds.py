"""Thresholds: the papers' oracle (best F1 on test labels), and label-free ones for deployment.

A sample is anomalous iff `score >= threshold`. The first half reads test labels, as the papers do, and its
results are upper bounds; the second half sees scores of normal images only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hclib.evaluation.metrics import MetricError, Ranking, confusion, rank, rank_pixels, summarise


def best_f1(ranking: Ranking) -> tuple[float, float]:
    """Return the threshold of the highest F1 of a `Ranking`, and that F1; of equal F1 the highest threshold.

    Without an anomalous sample the threshold is infinity (no false alarms) and F1 NaN: nothing to find.
    Without a normal sample it is the lowest anomalous score and F1 is 1. Source: HierCore section 4.2, the
    equation of T-hat.
    """
    if not ranking.positives.size:
        return float("inf"), float("nan")
    if not ranking.negatives.size:
        return float(ranking.positives[0]), 1.0
    result = summarise(ranking)
    return result["threshold"], result["f1_max"]


def f1_of(ranking: Ranking, threshold: float) -> float:
    """Compute F1 = 2 TP / (2 TP + FP + FN) of `score >= threshold`; NaN without an anomalous sample."""
    tp, fp = confusion(ranking, threshold)
    positives = ranking.positives.size
    return 2 * tp / (tp + fp + positives) if positives else float("nan")


def best_f1_threshold(labels: Any, scores: Any) -> float:
    """Return the threshold of the highest F1; arguments as `image_metrics`, one class as in `best_f1`."""
    return best_f1(rank(labels, scores))[0]


def f1_at(labels: Any, scores: Any, threshold: float) -> float:
    """Compute F1 of `scores >= threshold`; arguments as `image_metrics`; NaN without an anomalous sample."""
    return f1_of(rank(labels, scores), threshold)


def best_pixel_f1_threshold(chunks: Iterable[tuple[Any, Any]]) -> float:
    """Return the threshold of the highest pixel F1 over a stream of `(masks, maps)` chunks, each (n, H, W).

    Keeps 4 bytes a pixel for float32 maps; exact. Edge cases as in `best_f1`, errors as in `pixel_metrics`.
    """
    return best_f1(rank_pixels(chunks))[0]


def pixel_f1_at(chunks: Iterable[tuple[Any, Any]], threshold: float) -> float:
    """Compute F1 of `maps >= threshold` over a stream of `(masks, maps)` chunks, keeping only counts."""
    tp = fp = positives = 0
    for chunk in chunks:
        ranking = rank_pixels([chunk])
        hits, alarms = confusion(ranking, threshold)
        tp, fp, positives = tp + hits, fp + alarms, positives + ranking.positives.size
    return 2 * tp / (tp + fp + positives) if positives else float("nan")


def normal_threshold(scores: Any, *, quantile: float | None = None, k: float | None = None) -> float:
    """Choose a threshold from scores of normal images alone, for use where no test labels exist.

    The scores must come from normal images that the memory bank does not hold (held out, or scored with their
    own patches left out): an image in the bank scores near zero and the threshold would be far too low.

    By default the limit is median + k * MAD, MAD being the median absolute deviation from the median (not
    rescaled). It bears anomalous images among the supposedly normal ones as long as they are a clear
    minority. With `quantile`, the limit is the smallest score that at least this share of the images does not
    exceed: a false-alarm rate one can name, but it needs clean images, and more than 1 / (1 - quantile) of
    them, else it is their maximum.

    Args:
        scores: (N,) float, finite.
        quantile: share of the normal images to accept, in (0, 1]; None: the robust limit.
        k: MADs above the median, 0 or more; None: 4.5, three standard deviations where scores are normally
            distributed.

    Returns:
        The float32 number next above the limit, as a plain float, so that a score equal to the limit counts
        as normal: with `quantile` at most the share 1 - quantile of `scores` is called anomalous, and
        constant scores raise no alarm.

    Raises:
        MetricError: no scores, a score that is not finite, an option out of range, or both options given.

    Source of the robust form: MeDS, the selection threshold of its fine-tuning (which has k grow to 1 to
    select data).
    """
    scores = rank(np.zeros(np.shape(scores), dtype=bool), scores).negatives
    if not scores.size:
        raise MetricError("no normal scores to choose a threshold from: give those of at least one normal image")
    if quantile is not None:
        if k is not None:
            raise MetricError(f"quantile={quantile} and k={k}: give one of them")
        if not 0 < quantile <= 1:
            raise MetricError(f"quantile is {quantile}: the share of normal images to accept lies in (0, 1]")
        limit = float(scores[int(np.ceil(round(quantile * scores.size, 9))) - 1])
    else:
        k = 4.5 if k is None else k
        if not k >= 0:
            raise MetricError(f"k is {k}: the number of MADs above the median cannot be negative")
        median = float(np.median(scores))
        limit = median + k * float(np.median(np.abs(scores - median)))
    return float(np.nextafter(np.float32(limit), np.float32(np.inf)))


def normal_thresholds(scores: Any, groups: Any, *, fewest: int = 8, **options: Any) -> dict[int, float]:
    """Choose one `normal_threshold` for each group that images are routed to.

    Args:
        scores: (N,) float, scores of normal images outside the bank.
        groups: (N,) int, the group each was routed to.
        fewest: a group with fewer images takes the threshold of all images together, for its own would be
            noise.
        **options: as for `normal_threshold`.

    Returns:
        The threshold of each group in `groups`, and under key -1 that of all images together (for groups not
        seen).
    """
    scores, groups = np.asarray(scores), np.asarray(groups)
    if scores.shape != groups.shape:
        raise MetricError(f"scores has shape {scores.shape} but groups {groups.shape}: one group for each score")
    together = normal_threshold(scores, **options)
    found = {}
    for group in np.unique(groups).tolist():
        own = scores[groups == group]
        found[group] = normal_threshold(own, **options) if own.size >= fewest else together
    return {-1: together} | found
