"""The results of one run on disk, in open formats: configuration, metrics, binary decisions, timing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.scenarios import evaluate_rules

FILES = ("config.json", "metrics.csv", "decisions.csv", "timing.json")


def save_results(
    folder: str | os.PathLike,
    scores: Any,
    index: pd.DataFrame,
    *,
    config: Mapping[str, Any],
    timing: Mapping[str, float],
    rules: Sequence[tuple[str, str]] = (("class", "class"),),
    **options: Any,
) -> Path:
    """Write what HierCore's program saves (results, binary results, arguments, inference time), without pickle.

    Args:
        folder: new or holding earlier results, which are replaced as a whole.
        scores: `Scores` of the N images of `index`.
        index: index frame of the scored images.
        config: JSON values that identify the run -> `config.json`.
        timing: seconds and counts -> `timing.json`.
        rules: pairs (thresholds, aggregate) of `evaluate`; `metrics.csv` has the rows of all of them, per class and
            mean, at image and pixel level; `decisions.csv` has for each kind of threshold the threshold (oracle) and
            the decision (0 or 1) of every image.
        options: `size, pixel, masks` of `evaluate`.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder holds files that are not results.
        MetricError: from `evaluate`.
    """
    folder = Path(folder)
    others = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if others:
        raise FileExistsError(f"{folder} holds {others[0]}, which is no result of a run: choose a new folder")
    metrics = pd.concat(evaluate_rules(scores, index, list(rules), **options), ignore_index=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (aside / "config.json").write_text(json.dumps(dict(config), indent=1, sort_keys=True))
        (aside / "timing.json").write_text(json.dumps(dict(timing), indent=1, sort_keys=True))
        metrics.to_csv(aside / "metrics.csv", index=False)
        decide(scores, index, sorted({kind for kind, _ in rules})).to_csv(aside / "decisions.csv", index=False)
        aside.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def decide(scores: Any, index: pd.DataFrame, thresholds: Sequence[str]) -> pd.DataFrame:
    """Return one row per image with its score and, for each kind of threshold, the threshold and the decision.

    Args:
        scores: `Scores` of the N images of `index`.
        index: index frame.
        thresholds: any of "class", "global", "group"; each is the best F1 of its pool, chosen on the labels (oracle).

    Returns:
        `path, category, defect, label, score, group` and per kind `<kind> threshold`, `<kind> decision` (0 or 1);
        a threshold is NaN, and the decision 0, where a pool has only one kind of image.
    """
    table = index[["path", "category", "defect", "label"]].assign(score=scores.image, group=scores.group)
    for kind in thresholds:
        pools = {"class": table["category"], "group": table["group"], "global": pd.Series(0, table.index)}[kind]
        limit = pd.Series(np.nan, table.index)
        for _, rows in table.groupby(pools):
            limit[rows.index] = image_metrics(rows["label"].to_numpy(), rows["score"].to_numpy())["threshold"]
        table[f"{kind} threshold"] = limit
        table[f"{kind} decision"] = (table["score"] >= limit).astype(int)
    return table
