"""HierCore's label scenarios: F1 under thresholds per class, one for all, or one per routed group.

Every threshold here is an oracle, as in the paper (section 4.2): it maximises F1 on the test labels of the
samples it is applied to. The frames say so in the column `chosen_on`. What differs is what the threshold may
know:

- "class": one per category. Needs the category of each test image ("Known" evaluation).
- "global": one for all images ("Unknown" evaluation of the paper's baselines).
- "group": one per group that the detector routed images to, `Scores.group`. Needs no category (HierCore's
  clusters).

Pools with one class only. Without an anomalous sample a pool's threshold is infinity: it raises no alarm.
Without a normal sample it is the lowest score: everything is an alarm. A category without anomalous samples
has F1 NaN, its false alarms stand in `fp`; one without normal samples has an F1 but NaN in the ranking
metrics. Means leave NaN out, and `reason` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hclib.evaluation.metrics import MetricError, Ranking, confusion, pool, rank, rank_pixels, summarise
from hclib.evaluation.thresholds import best_f1

THRESHOLDS = ("class", "global", "group")
SCENARIOS = {
    f"{t}->{e}": (training, evaluation)
    for t, training in (("K", "known"), ("U", "unknown"))
    for e, evaluation in (("K", "known"), ("U", "unknown"))
}
_AVERAGED = ["f1", "auroc", "ap", "f1_max", "aupro", "iou_max"]
_COUNTED = ["n_normal", "n_anomalous", "tp", "fp"]
_COLUMNS = ["category", "level", "thresholds", "aggregate", "chosen_on", "f1", "threshold", *_AVERAGED[1:]]
_COLUMNS += [*_COUNTED, "groups", "reason"]
_CHUNK = 32  # images whose maps are held at full size at a time


class Cell(NamedTuple):
    """The samples of one category that were routed to one group."""

    category: str
    group: int
    ranking: Ranking


def evaluate(
    scores: Any,
    index: pd.DataFrame,
    thresholds: str = "class",
    *,
    size: int = 256,
    pixel: bool = True,
    masks: np.ndarray | None = None,
    aggregate: str = "class",
    fpr_limit: float = 0.3,
) -> pd.DataFrame:
    """Measure scores per category, at image and pixel level, under one way of choosing thresholds.

    Args:
        scores: `Scores` of the N images of `index`, in its order: `image` (N,) float, `group` (N,) int, and
            for pixels `patch` (N, h, w), `subset(rows)` and `upsample(size)` -> (n, size, size) float.
        index: index frame of the N scored images (`path, mask_path, category, label`).
        thresholds: "class", "global" or "group" (see the module); all are oracles.
        size: side of the square on which pixels are compared.
        pixel: whether to add the pixel level.
        masks: (N, size, size) bool; None reads them from `index`. Then anomalous images without a mask are
            left out of the pixel level, and `reason` counts them.
        aggregate: what group thresholds' F1 is computed over and averaged over. "class": the decisions, each
            made with the threshold of its own pool, are scored per category, then averaged over categories.
            "cluster" (with "group" thresholds only): per routed group, then averaged over groups. HierCore
            does not say which it reports; see the reference notes, 1.2.
        fpr_limit: upper end of AUPRO's false-positive rate.

    Returns:
        One row per category (or "group k") and level, and a row "mean" for each level. `f1` and `threshold`
        follow `thresholds`; `threshold` is NaN where several apply; `auroc, ap, f1_max, aupro, iou_max` are
        the row's own and depend on no threshold choice. `n_normal`, `n_anomalous`, `tp`, `fp` count images or
        pixels, in the row "mean" over all rows; `groups` is the number of groups that the row's images were
        routed to.

    Raises:
        MetricError: an unknown choice, lengths or shapes that differ, a score that is not finite (its file is
            named).

    Source: HierCore sections 4.2 and 4.4, Tables 4, 5 and B.11 to B.14.
    """
    _check_choice(thresholds, aggregate)
    return _frame(_levels(scores, index, size=size, pixel=pixel, masks=masks), thresholds, aggregate, fpr_limit)


def evaluate_rules(
    scores: Any,
    index: pd.DataFrame,
    rules: Sequence[tuple[str, str]],
    *,
    fpr_limit: float = 0.3,
    **options: Any,
) -> list[pd.DataFrame]:
    """Evaluate the same scores under several rules, upsampling and sorting the pixels once.

    Args:
        scores: as for `evaluate`.
        index: as for `evaluate`.
        rules: pairs (thresholds, aggregate) of `evaluate`.
        fpr_limit: as for `evaluate`.
        **options: `size, pixel, masks` of `evaluate`.

    Returns:
        One frame of `evaluate` per rule, in their order.
    """
    for rule in rules:
        _check_choice(*rule)
    levels = _levels(scores, index, **options)
    return [_frame(levels, *rule, fpr_limit) for rule in rules]


def diff_ratio(known: pd.DataFrame, unknown: pd.DataFrame) -> pd.DataFrame:
    """Compare F1 without class labels to F1 with them: HierCore's Diff. Ratio, as a fraction.

    Args:
        known: frame of `evaluate` with class thresholds.
        unknown: frame of `evaluate` with global or group thresholds, of the same categories.

    Returns:
        `category, level, f1_known, f1_unknown, diff_ratio` for the rows that both frames have (a frame
        aggregated by cluster shares only "mean"). The ratio of the means is the paper's, not the mean of the
        ratios. NaN when F1 with labels is 0 or undefined.

    Raises:
        MetricError: a frame has two rows for one category and level, or no row is shared.
    """
    keys = ["category", "level"]
    for name, frame in (("known", known), ("unknown", unknown)):
        if (twice := frame.duplicated(keys)).any():
            row = frame.loc[twice, keys].iloc[0].tolist()
            raise MetricError(f"the {name} frame has several rows for {row}: compare one evaluation at a time")
    pair = known[[*keys, "f1"]].merge(unknown[[*keys, "f1"]], on=keys, suffixes=("_known", "_unknown"))
    if not len(pair):
        raise MetricError("the two frames share no category and level: evaluate the same index for both")
    return pair.assign(diff_ratio=(pair.f1_unknown / pair.f1_known).where(pair.f1_known > 0))


def scenario_table(
    runs: Mapping[str, Any],
    index: pd.DataFrame,
    *,
    unknown: str = "group",
    aggregate: str = "class",
    fpr_limit: float = 0.3,
    **options: Any,
) -> pd.DataFrame:
    """Evaluate HierCore's four label scenarios, training -> evaluation, K known and U unknown classes.

    Args:
        runs: `Scores` under any of "K->K", "U->K", "K->U", "U->U". With known evaluation a detector may use
            the category of a test image to pick its bank, so "K->K" and "K->U" usually hold different scores;
            a detector trained without labels has one set of scores for both "U->K" and "U->U" (one object is
            upsampled once).
        index: index frame of the scored images.
        unknown: thresholds of unknown evaluation, "group" (HierCore) or "global" (the paper's baselines).
        aggregate: reading of the group thresholds, as in `evaluate`; known evaluation always goes by class.
        fpr_limit: upper end of AUPRO's false-positive rate.
        **options: `size, pixel, masks` of `evaluate`.

    Returns:
        The rows of `evaluate` with the columns `scenario, training, evaluation` before, and `diff_ratio`
        after them: of a row with unknown evaluation to the same row with known evaluation and the same
        training, NaN where that is absent.

    Raises:
        MetricError: an unknown scenario name, no runs, or whatever `evaluate` raises.
    """
    if not runs or set(runs) - set(SCENARIOS):
        raise MetricError(f"runs are {sorted(runs)}: give scores for one or more of {', '.join(SCENARIOS)}")
    _check_choice(unknown, aggregate)
    levels: dict[int, list[_Level]] = {}
    frames: dict[str, pd.DataFrame] = {}
    for name in (s for s in SCENARIOS if s in runs):
        training, evaluation = SCENARIOS[name]
        if id(runs[name]) not in levels:
            levels[id(runs[name])] = _levels(runs[name], index, **options)
        choice = ("class", "class") if evaluation == "known" else (unknown, aggregate)
        frame = _frame(levels[id(runs[name])], *choice, fpr_limit)
        ratio = np.full(len(frame), np.nan)
        if evaluation == "unknown" and f"{name[0]}->K" in frames:
            pairs = diff_ratio(frames[f"{name[0]}->K"], frame).set_index(["category", "level"]).diff_ratio
            ratio = pairs.reindex(pd.MultiIndex.from_frame(frame[["category", "level"]])).to_numpy()
        for i, column in enumerate([("scenario", name), ("training", training), ("evaluation", evaluation)]):
            frame.insert(i, *column)
        frames[name] = frame.assign(diff_ratio=ratio)
    return pd.concat(frames.values(), ignore_index=True)


@dataclass(frozen=True)
class _Level:
    name: str  # image or pixel
    cells: list[Cell]
    notes: dict[str, str]  # category -> what was left out
    known: dict[tuple, dict[str, Any]] = field(default_factory=dict)

    def measured(self, members: list[int], fpr_limit: float) -> dict[str, Any]:
        """Measure the pool of some cells, once however many thresholds and scenarios ask for it."""
        key = (fpr_limit, *sorted(members))
        if key not in self.known:
            self.known[key] = _measure(pool(self.cells[i].ranking for i in key[1:]), fpr_limit)
        return self.known[key]


def _levels(
    scores: Any, index: pd.DataFrame, *, size: int = 256, pixel: bool = True, masks: np.ndarray | None = None
) -> list[_Level]:
    _check_scores(scores, index, pixel)
    labels, image = index["label"].to_numpy(), np.asarray(scores.image)
    cells = [Cell(*key, rank(labels[rows], image[rows])) for key, rows in _rows(scores, index)]
    levels = [_Level("image", cells, {})]
    if pixel:
        levels.append(_pixel_level(scores, index, size, masks))
    return levels


def _pixel_level(scores: Any, index: pd.DataFrame, size: int, masks: np.ndarray | None) -> _Level:
    keep = np.ones(len(index), dtype=bool)
    if masks is None:
        keep = (index["label"].to_numpy() == 0) | (index["mask_path"].fillna("").to_numpy() != "")
    elif np.shape(masks) != (len(index), size, size):
        raise MetricError(f"masks has shape {np.shape(masks)}: {(len(index), size, size)} is needed")
    missing = index.loc[~keep, "category"].astype(str).value_counts()
    notes = {category: f"{count} anomalous images without a mask left out" for category, count in missing.items()}
    cells = [
        Cell(*key, rank_pixels(_chunks(scores, index, rows[keep[rows]], size, masks)))
        for key, rows in _rows(scores, index)
    ]
    return _Level("pixel", cells, notes)


def _chunks(
    scores: Any, index: pd.DataFrame, rows: np.ndarray, size: int, masks: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from hclib.images import read_masks

    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        read = read_masks(index.iloc[part], size) if masks is None else masks[part]
        yield read, np.asarray(scores.subset(part).upsample(size))


def _rows(scores: Any, index: pd.DataFrame) -> list[tuple[tuple[str, int], np.ndarray]]:
    """Split rows by category and routed group: ((category, group), row numbers), sorted."""
    frame = pd.DataFrame({"category": index["category"].astype(str).to_numpy(), "group": np.asarray(scores.group)})
    found = frame.groupby(["category", "group"], sort=True).indices
    return [((str(category), int(group)), np.sort(rows)) for (category, group), rows in found.items()]


def _frame(levels: list[_Level], thresholds: str, aggregate: str, fpr_limit: float) -> pd.DataFrame:
    rows = [row for level in levels for row in _level_rows(level, thresholds, aggregate, fpr_limit)]
    how = {"thresholds": thresholds, "aggregate": aggregate, "chosen_on": "test labels"}
    return pd.DataFrame(rows).assign(**how)[_COLUMNS]


def _level_rows(level: _Level, thresholds: str, aggregate: str, fpr_limit: float) -> list[dict[str, Any]]:
    cells = level.cells
    pools = _members(cells, thresholds)
    cut = {i: (name, level.measured(members, fpr_limit)) for name, members in pools.items() for i in members}
    rows = []
    for name, members in _members(cells, aggregate).items():
        found = level.measured(members, fpr_limit)
        hits, alarms = np.sum([confusion(cells[i].ranking, cut[i][1]["cut"]) for i in members], axis=0).tolist()
        cuts = {cut[i][1]["cut"] for i in members}
        reasons = {found["reason"]} | {level.notes.get(cells[i].category, "") for i in members}
        if thresholds == "group" and aggregate == "class":
            reasons |= {f"{cut[i][0]}: {cut[i][1]['reason']}" for i in members if cut[i][1]["reason"]}
        p = found["n_anomalous"]
        rows.append(
            {
                **found,
                "category": name,
                "level": level.name,
                "f1": 2 * hits / (hits + alarms + p) if p else float("nan"),
                "threshold": cuts.pop() if len(cuts) == 1 else float("nan"),
                "tp": hits,
                "fp": alarms,
                "groups": len({cells[i].group for i in members}),
                "reason": "; ".join(sorted(reasons - {""})),
            }
        )
    return [*rows, _mean_row(rows, level)]


def _members(cells: list[Cell], unit: str) -> dict[str, list[int]]:
    """Gather the positions of the cells of each category ("class"), of each group, or of all ("global")."""
    order = range(len(cells))
    if unit in ("group", "cluster"):
        order = sorted(order, key=lambda i: cells[i].group)
    members: dict[str, list[int]] = {}
    for i in order:
        name = {"class": cells[i].category, "global": "all"}.get(unit, f"group {cells[i].group}")
        members.setdefault(name, []).append(i)
    return members


def _measure(ranking: Ranking, fpr_limit: float) -> dict[str, Any]:
    """Return the metrics of a pool, the threshold `cut` for its decisions, its counts and what it lacks."""
    found = {"reason": "", **summarise(ranking, fpr_limit)}
    found["cut"] = best_f1(ranking)[0] if found["reason"] else found["threshold"]
    return found | {"n_normal": int(ranking.negatives.size), "n_anomalous": int(ranking.positives.size)}


def _mean_row(rows: list[dict[str, Any]], level: _Level) -> dict[str, Any]:
    table = pd.DataFrame(rows)
    cuts = table["threshold"].unique()
    undefined = table.loc[table["f1"].isna() | table["auroc"].isna(), "category"].tolist()
    return {
        "category": "mean",
        "level": level.name,
        **{key: float(table[key].mean()) for key in _AVERAGED},
        "threshold": cuts.item() if len(cuts) == 1 else float("nan"),
        **{key: int(table[key].sum()) for key in _COUNTED},
        "groups": len({cell.group for cell in level.cells}),
        "reason": f"undefined values left out of the mean: {', '.join(undefined)}" if undefined else "",
    }


def _check_choice(thresholds: str, aggregate: str) -> None:
    if thresholds not in THRESHOLDS:
        raise MetricError(f"unknown thresholds {thresholds!r}: use one of {', '.join(THRESHOLDS)}")
    if aggregate not in ("class", "cluster") or (aggregate == "cluster" and thresholds != "group"):
        raise MetricError(f"aggregate={aggregate!r}, thresholds={thresholds!r}: use 'class', or 'cluster' with 'group'")


def _check_scores(scores: Any, index: pd.DataFrame, pixel: bool) -> None:
    columns = {"category", "label"} | ({"mask_path"} if pixel else set())
    if missing := sorted(columns - set(index.columns)):
        raise MetricError(f"the index frame lacks the columns {', '.join(missing)}")
    if not len(index):
        raise MetricError("the index frame has no rows: there is nothing to evaluate")
    for name in ("image", "group", *(["patch"] if pixel else [])):
        values = np.asarray(getattr(scores, name))
        if len(values) != len(index):
            raise MetricError(f"scores.{name} has {len(values)} rows, the index {len(index)}: score exactly its images")
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            file = index["path"].iloc[row] if "path" in index else f"row {row}"
            raise MetricError(f"scores.{name} of {file} (row {row}) is NaN or infinite, and {int(bad.sum()) - 1} more")
