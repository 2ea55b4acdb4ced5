"""Exact image and pixel metrics from one sort of the scores, in about as much memory as the scores.

Decision convention of the whole room: a sample is called anomalous iff `score >= threshold`.

Every metric here changes only at the distinct scores of anomalous samples: between two of them the number of
true positives stands still. So the normal scores are sorted as they are (4 bytes a pixel for float32), the
few anomalous ones beside them, and at each distinct anomalous score the false positives are counted by binary
search. Nothing is binned, rounded or sampled, and scores that are equal move together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

_BLOCK = 1 << 19  # distinct thresholds worked on at a time; bounds memory, changes no result but float rounding
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_MAD_KEYS = {
    "I": {"image": ("auroc", "ap", "f1_max")},
    "P": {"pixel": ("auroc", "ap", "f1_max", "aupro", "iou_max")},
    "hiercore8": {
        "image": ("auroc", "ap", "f1_max"),
        "pixel": ("auroc", "ap", "f1_max", "aupro", "iou_max"),
    },
    "ader7": {"image": ("auroc", "ap", "f1_max"), "pixel": ("auroc", "ap", "f1_max", "aupro")},
}


class MetricError(ValueError):
    """Labels, masks or scores that no metric can be computed from."""


class Ranking(NamedTuple):
    """Sorted scores of a pool of samples, all that the metrics need; pools add up by `pool`."""

    positives: np.ndarray  # (P,) scores of anomalous samples, ascending
    negatives: np.ndarray  # (N,) scores of normal samples, ascending
    regions: np.ndarray  # (P,) int32, the region of each anomalous pixel; (0,) for images
    areas: np.ndarray  # (R,) int64, pixels of each region; (0,) for images


def image_metrics(labels: Any, scores: Any) -> dict[str, Any]:
    """Compute AUROC, average precision and the best F1 of image scores.

    Args:
        labels: (N,) bool or 0/1, 1 is anomalous.
        scores: (N,) float, higher is more anomalous.

    Returns:
        Plain floats `auroc, ap, f1_max, threshold`. `score >= threshold` attains `f1_max` exactly; of several
        such thresholds it is the highest. It is chosen on the labels given: an oracle. With one class only,
        all four are NaN and `reason` says which class is missing.

    Raises:
        MetricError: shapes differ, a label is neither 0 nor 1, or a score is NaN or infinite (its row is
            named).
    """
    result = summarise(rank(labels, scores))
    return {key: result[key] for key in ("auroc", "ap", "f1_max", "threshold", "reason") if key in result}


def pixel_metrics(masks: Any, maps: Any, fpr_limit: float = 0.3) -> dict[str, Any]:
    """Compute AUROC, average precision, best F1, best IoU and AUPRO over all pixels, exactly.

    AUPRO is the area under the mean per-region overlap against the false-positive rate, from 0 to `fpr_limit`
    (interpolated there), divided by `fpr_limit`; regions are 8-connected. F1 and IoU have their best value at
    the same threshold.

    Args:
        masks: (N, H, W) bool or 0/1, 1 is anomalous.
        maps: (N, H, W) float, higher is more anomalous.
        fpr_limit: upper end of the false-positive rate, in (0, 1].

    Returns:
        Plain floats `auroc, ap, f1_max, iou_max, aupro, threshold`; with one class only all NaN and a
        `reason`.

    Raises:
        MetricError: shapes differ, a mask value is neither 0 nor 1, a score is NaN or infinite (its image is
            named), or `fpr_limit` is outside (0, 1].

    Source: HierCore section 4.2 names the five metrics; per-region overlap is Bergmann et al., IJCV 2021,
        section 5.
    """
    result = summarise(rank_pixels([(masks, maps)]), fpr_limit)
    names = ("auroc", "ap", "f1_max", "iou_max", "aupro", "threshold", "reason")
    return {key: result[key] for key in names if key in result}


def mad(metrics: Mapping[str, Any], kind: str = "I") -> float:
    """Average metrics into one mean anomaly detection score.

    Args:
        metrics: for "I" the dict of `image_metrics`, for "P" that of `pixel_metrics`, otherwise both as
            `{"image": ..., "pixel": ...}` (which "I" and "P" take too).
        kind: "I" mean of the 3 image metrics, "P" of the 5 pixel metrics, "hiercore8" of these 8 (HierCore
            section 4.2), "ader7" without the best IoU (the tables of ADer).

    Returns:
        The mean as a plain float; NaN when one of its metrics is NaN.

    Raises:
        MetricError: unknown `kind`, or a metric that it needs is missing.
    """
    if kind not in _MAD_KEYS:
        raise MetricError(f"unknown mAD kind {kind!r}: use one of {', '.join(_MAD_KEYS)}")
    values = []
    for level, names in _MAD_KEYS[kind].items():
        part = metrics.get(level) if kind not in ("I", "P") or level in metrics else metrics
        for name in names:
            if part is None or name not in part:
                raise MetricError(f"mAD kind {kind!r} needs {level} metric {name!r}, which is not given")
            values.append(float(part[name]))
    return float(sum(values) / len(values))


def rank(labels: Any, scores: Any) -> Ranking:
    """Sort image scores into a `Ranking`; takes and raises what `image_metrics` does."""
    scores = _floats(scores, 1, "scores")
    labels = _booleans(labels, scores.shape, "labels")
    _reject_nonfinite(scores, "scores", 0)
    empty = np.empty(0, dtype=np.int64)
    return Ranking(np.sort(scores[labels]), np.sort(scores[~labels]), empty.astype(np.int32), empty)


def rank_pixels(chunks: Iterable[tuple[Any, Any]]) -> Ranking:
    """Sort the pixels of a stream of `(masks, maps)` chunks, each (n, H, W), into one `Ranking`.

    Holds 4 bytes a pixel for float32 maps (twice that while chunks are joined), whatever the size of the
    chunks. Raises like `pixel_metrics`; rows in messages count from the first chunk.
    """
    positives, negatives = [], []
    regions, areas = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    row = region = 0
    for masks, maps in chunks:
        maps = _floats(maps, 3, "maps")
        masks = _booleans(masks, maps.shape, "masks")
        _reject_nonfinite(maps, "maps", row)
        positives.append(maps[masks])
        negatives.append(np.sort(maps[~masks]))
        for mask in masks:
            numbers, sizes = _label_regions(mask)
            regions.append(numbers + region)
            areas.append(sizes)
            region += len(sizes)
        row += len(maps)
    empty = [np.empty(0, np.float32)]
    return _join(positives or empty, negatives or empty, regions, areas)


def pool(rankings: Iterable[Ranking]) -> Ranking:
    """Join rankings into that of all their samples; one ranking alone is handed back as it is."""
    parts = list(rankings)
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0] + [len(part.areas) for part in parts])
    regions = [part.regions + np.int32(start) for part, start in zip(parts, offsets, strict=False)]
    return _join([p.positives for p in parts], [p.negatives for p in parts], regions, [p.areas for p in parts])


def confusion(ranking: Ranking, threshold: float) -> tuple[int, int]:
    """Count true and false positives of `score >= threshold`.

    The threshold may be infinite (nothing is anomalous); NaN raises MetricError.
    """
    threshold = float(threshold)
    if np.isnan(threshold):
        raise MetricError("the threshold is NaN: decisions need a number (infinity calls nothing anomalous)")
    counts = []
    for scores in (ranking.positives, ranking.negatives):
        with np.errstate(over="ignore"):
            cut = np.asarray(threshold, dtype=scores.dtype)  # keeps searchsorted from widening all scores
        # rounding may have taken the threshold down onto a score below it: take the next number
        if float(cut) < threshold:
            cut = np.nextafter(cut, np.asarray(np.inf, dtype=scores.dtype))
        counts.append(int(scores.size - np.searchsorted(scores, cut, side="left")))
    return counts[0], counts[1]


def summarise(ranking: Ranking, fpr_limit: float = 0.3) -> dict[str, Any]:
    """Compute every metric of a `Ranking`.

    Returns plain floats `auroc, ap, f1_max, iou_max, aupro, threshold` (`aupro` NaN for images, which have no
    regions); all NaN plus `reason` when one class is missing. Raises MetricError when `fpr_limit` is outside
    (0, 1].
    """
    if not 0 < fpr_limit <= 1:
        raise MetricError(f"fpr_limit is {fpr_limit}: it is the upper end of the false-positive rate, in (0, 1]")
    p, n = ranking.positives.size, ranking.negatives.size
    if not p or not n:
        keys = ("auroc", "ap", "f1_max", "iou_max", "aupro", "threshold")
        return dict.fromkeys(keys, float("nan")) | {"reason": _missing(p, n)}
    pairs, ap, best, threshold, iou = 0, 0.0, -1.0, float("nan"), 0.0
    overlap = _OverlapArea(fpr_limit * n, len(ranking.areas))
    hits = 0  # true positives at the threshold above the block
    for values, tp, above, fp, gain in _sweep(ranking):
        gained = np.diff(tp, prepend=hits)
        pairs += int(gained @ (2 * n - above - fp))  # twice the pairs ranked rightly, a tie counting one half
        ap += float(gained @ (tp / (tp + fp)))
        f1 = 2 * tp / (tp + fp + p)
        top = int(np.argmax(f1))
        if f1[top] > best:
            best, threshold, iou = float(f1[top]), float(values[top]), float(tp[top] / (fp[top] + p))
        if gain is not None:
            overlap.add(above, fp, gain)
        hits = int(tp[-1])
    aupro = overlap.finish(n) / (fpr_limit * n) if len(ranking.areas) else float("nan")
    return {
        "auroc": pairs / (2 * p * n),
        "ap": ap / p,
        "f1_max": best,
        "iou_max": iou,
        "aupro": aupro,
        "threshold": threshold,
    }


class _OverlapArea:
    """Area under mean per-region overlap up to `limit` false positives, gathered block by block."""

    def __init__(self, limit: float, regions: int) -> None:
        self.limit, self.regions = limit, regions
        self.area, self.overlap, self.fp = 0.0, 0.0, 0

    def add(self, above: np.ndarray, fp: np.ndarray, gain: np.ndarray) -> None:
        """Add thresholds, high to low: normal pixels above and at or above each, region shares gained."""
        after = self.overlap + np.cumsum(gain)
        before = np.concatenate([[self.overlap], after[:-1]])
        last = np.concatenate([[self.fp], fp[:-1]])
        self.area += self._trapezoids(last, above, before, before)  # only normal pixels cross: the overlap rests
        self.area += self._trapezoids(above, fp, before, after)  # normal and anomalous pixels of one score
        self.overlap, self.fp = float(after[-1]), int(fp[-1])

    def finish(self, normals: int) -> float:
        """Return the mean area over the regions once all `normals` have crossed."""
        end = np.array([self.overlap])
        self.area += self._trapezoids(np.array([self.fp]), np.array([normals]), end, end)
        return self.area / self.regions

    def _trapezoids(self, x0: np.ndarray, x1: np.ndarray, y0: np.ndarray, y1: np.ndarray) -> float:
        width = (x1 - x0).astype(np.float64)
        part = np.clip((self.limit - x0) / np.maximum(width, 1), 0, 1)  # share of each piece left of the limit
        return float(np.sum(width * part * (y0 + part * (y1 - y0) / 2)))


def _sweep(ranking: Ranking) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield blocks of distinct anomalous scores from high to low.

    Each block: scores; anomalous samples at or above (true positives); normal samples above; normal samples
    at or above (false positives); sum over the pixels of that score of 1 / area of their region (None for
    images).
    """
    scores, normals = ranking.positives, ranking.negatives
    new = np.concatenate([[True], scores[1:] != scores[:-1]])
    starts = np.append(np.flatnonzero(new), scores.size)  # first position of each distinct score, then the end
    weight = 1.0 / ranking.areas
    for stop in range(starts.size - 1, 0, -_BLOCK):
        bounds = starts[max(stop - _BLOCK, 0) : stop + 1]
        first = bounds[:-1][::-1]
        values = scores[first]
        above = normals.size - np.searchsorted(normals, values, side="right")
        fp = normals.size - np.searchsorted(normals, values, side="left")
        gain = None
        if weight.size:
            part = weight[ranking.regions[bounds[0] : bounds[-1]]]
            gain = np.add.reduceat(part, bounds[:-1] - bounds[0])[::-1]
        yield values, scores.size - first, above, fp, gain


def _join(
    positives: list[np.ndarray],
    negatives: list[np.ndarray],
    regions: list[np.ndarray],
    areas: list[np.ndarray],
) -> Ranking:
    scores, numbers = np.concatenate(positives), np.concatenate(regions)
    order = np.argsort(scores, kind="stable")
    normals = negatives[0]
    if len(negatives) > 1:
        normals = np.concatenate(negatives)
        normals.sort()
    return Ranking(scores[order], normals, numbers[order] if numbers.size else numbers, np.concatenate(areas))


def _label_regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the 8-connected regions of a mask: the region of each set pixel in row order, and the areas."""
    from scipy import ndimage

    if not mask.any():
        return np.empty(0, np.int32), np.empty(0, np.int64)
    labelled, _ = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    numbers = labelled[mask].astype(np.int32) - np.int32(1)
    return numbers, np.bincount(numbers)


def _missing(p: int, n: int) -> str:
    if not p and not n:
        return "no samples"
    return f"no anomalous sample among {n}" if not p else f"no normal sample among {p}"


def _floats(values: Any, ndim: int, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != ndim:
        raise MetricError(f"{name} has shape {array.shape}: {ndim} dimension(s) are needed")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    return array


def _booleans(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape:
        raise MetricError(f"{name} has shape {array.shape} but the scores have {shape}: they must be equal")
    if array.dtype == bool:
        return array
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        where = np.unravel_index(int(np.argmax(wrong)), shape)
        raise MetricError(
            f"{name}{[int(i) for i in where]} is {array[where]}: it must be 0 or 1, so binarise soft masks"
        )
    return array.astype(bool)


def _reject_nonfinite(scores: np.ndarray, name: str, row: int) -> None:
    for i, part in enumerate(scores if scores.ndim > 1 else scores[None]):
        finite = np.isfinite(part)
        if finite.all():
            continue
        where = np.unravel_index(int(np.argmin(finite)), part.shape)
        at = (i + row, *map(int, where)) if scores.ndim > 1 else (int(where[0]) + row,)
        raise MetricError(f"{name}{list(at)} is {part[where]} (row {at[0]}): scores must be finite numbers")
