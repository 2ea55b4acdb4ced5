"""One training of the MeDS chapter: a detector on a contaminated set of several products, and what it made of it."""

from __future__ import annotations

import inspect
import time
from typing import Any

import numpy as np
import pandas as pd

from hclib.book.experiments import METHODS, features_of, split
from hclib.book.noise_experiments import METRICS, SHORT_FUNAD, reduce_channels, training_aids
from hclib.data.contamination import contaminate, realised
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.scenarios import evaluate
from hclib.kernels.features import Features
from hclib.methods.meds import BootstrappedMemory, MeDS, selection_threshold
from hclib.methods.student_detector import StudentDetector
from hclib.paths import cache_dir

BANKS = {
    "SoftPatch": {"ratio": 0.1},
    "InReaCh": {"ratio": 0.1},
    "PatchCore": {"ratio": 0.1},
    "HierCore": {"ratio": 0.1},
    "FunAD": SHORT_FUNAD,
}
"""The methods of Tables 1 to 3 without a student, and their options here."""


def drawn_set(config: dict) -> Features:
    """Return the images that a run draws its training and test set from: a part of every category, the same for all.

    Args:
        config: as for `features_of`; `train_images`, `test_normal` and `test_anomalous`, images kept per category (0
            for all), drawn by `draw_seed`.
    """
    features = features_of(config)
    rng, kept = np.random.default_rng(config["draw_seed"]), []
    for (_, part, label), rows in sorted(features.index.groupby(["category", "split", "label"]).indices.items()):
        count = config["train_images" if part == "train" else "test_anomalous" if label else "test_normal"]
        kept.append(rng.permutation(rows)[: count or None])
    return features.subset(np.sort(np.concatenate(kept)))


def contaminated(config: dict) -> tuple[Features, Features, dict[str, Any]]:
    """Return training and test features of a run, and what was injected.

    Args:
        config: as for `drawn_set`, with `noise`, options of `contaminate`; injected images stay in the test set unless
            `noise` says otherwise.

    Returns:
        Training features, test features, and `train_normal, train_anomalous, realised_per_normal, realised_of_total`.
    """
    features = drawn_set(config)
    index, manifest = contaminate(features.index, **config["noise"])
    train, test = split(features.align(index))
    counts = realised(manifest).loc["all"]
    facts = {"train_normal": int(counts["normals"]), "train_anomalous": int(counts["moved"])}
    return train, test, facts | {f"realised_{k}": float(counts[k]) for k in ("per_normal", "of_total")}


def fitted(config: dict, train: Features, test: Features) -> Any:
    """Return the detector of a config, fitted; students go on from their checkpoints.

    Args:
        config: `method`, `options`, `seed`, and `labels`: true if `fit` is told the product of every image.
        train: contaminated training features.
        test: for FUN-AD's choice of an epoch, which is recorded but not used.
    """
    options, extra = dict(config.get("options", {})), {}
    if config["method"] in ("MeDS", "StudentDetector"):
        options["checkpoint"] = cache_dir() / "students"
    if config["method"] == "FunAD":
        extra = training_aids(train, test)
    detector = METHODS[config["method"]](seed=config["seed"], **options)
    if config.get("labels"):
        return detector.fit(train, list(train.index["category"]), **extra)
    return detector.fit(train, **extra)


def meds_run(config: dict) -> pd.DataFrame:
    """Return what one detector trained on a contaminated set does on the test set, and with its own training set.

    Args:
        config: as for `contaminated` and `fitted`; `size` of the pixel level; `components`, to which the patches are
            reduced first (not at all by default).

    Returns:
        Rows of three kinds, per category and "mean". `level` "image" and "pixel": metrics, `test_set` "all"; "image"
        also with `test_set` "seen" and "unseen": all normal test images with the anomalies that are, or are not, in the
        training set too. `level` "review": how well the training images are ranked for a reviewer (`review_metrics`),
        `stage` "own", or MeDS's "memory", "distilled" and "final". The first row holds the training history as lists.
    """
    train, test, facts = contaminated(config)
    if config.get("components"):
        train, test = reduce_channels(train, test, config["components"])
    start = time.perf_counter()
    detector = fitted(config, train, test)
    middle = time.perf_counter()
    named = isinstance(detector, BootstrappedMemory) and config.get("labels")  # the only one that needs them to score
    scores = detector.score(test, list(test.index["category"]) if named else None)
    facts |= {"fit_seconds": middle - start, "score_seconds": time.perf_counter() - middle}
    frames = [evaluate(scores, test.index, size=config["size"]).assign(test_set="all")]
    seen = test.index["path"].isin(train.index["path"][train.index["label"] == 1]).to_numpy()
    for name, anomalous in (("seen", seen), ("unseen", ~seen & (test.index["label"] == 1).to_numpy())):
        rows = anomalous | (test.index["label"] == 0).to_numpy()
        frames.append(_by_category(scores.image[rows], test.index[rows]).assign(test_set=name, level="image"))
    rows = pd.concat(frames, ignore_index=True)
    rows = rows[["category", "level", "test_set", *METRICS, "n_normal", "n_anomalous"]]
    rows = pd.concat([rows, review(detector, train).assign(level="review")], ignore_index=True).assign(**facts)
    for key, values in selection_history(detector).items():
        rows[f"history_{key}"] = [values] + [None] * (len(rows) - 1)
    return rows


def review(detector: Any, train: Features) -> pd.DataFrame:
    """Return `review_metrics` of a student's scores of its training images, per stage; empty without anomalies."""
    index = train.index
    if not isinstance(detector, StudentDetector) or not (index["label"] == 1).any():
        return pd.DataFrame(columns=["category", "stage"])
    stages = detector.selection_scores if isinstance(detector, MeDS) else {"own": detector.score(train).image}
    return pd.concat([review_metrics(index, values).assign(stage=name) for name, values in stages.items()])


def review_metrics(index: pd.DataFrame, scores: np.ndarray) -> pd.DataFrame:
    """Return how well scores rank a training set for review (MeDS, section 5.5): a row per category and their mean.

    Args:
        index: of the training images, with their hidden labels.
        scores: (N,), the worst highest.

    Returns:
        `category, auroc, auprc, depth, least_depth, n_normal, n_anomalous`: area under the precision-recall curve
        (average precision), inspection depth, the share of the images that is reviewed when the last anomaly is found
        (of images with equal scores the normal ones come first), and the least it could be. Categories without an
        injected image are left out. "pooled" ranks all images at once, by `excess`.
    """
    groups = [(name, np.asarray(rows)) for name, rows in sorted(index.groupby("category").indices.items())]
    pooled = np.concatenate([excess(scores[rows]) for _, rows in groups])
    order = np.concatenate([rows for _, rows in groups])
    labels, found = index["label"].to_numpy(), []
    for name, values, truth in [(n, scores[r], labels[r]) for n, r in groups] + [("pooled", pooled, labels[order])]:
        if not 0 < truth.sum() < len(truth):
            continue
        metrics = image_metrics(truth, values)
        row = {"category": name, "auroc": metrics["auroc"], "auprc": metrics["ap"]}
        row |= {"depth": float((values >= values[truth == 1].min()).mean()), "least_depth": float(truth.mean())}
        found.append({**row, "n_normal": int((truth == 0).sum()), "n_anomalous": int(truth.sum())})
    table = pd.DataFrame(found)
    mean = table[table["category"] != "pooled"].drop(columns="category").mean().to_dict()
    return pd.concat([table, pd.DataFrame([{"category": "mean", **mean}])], ignore_index=True)


def excess(scores: np.ndarray) -> np.ndarray:
    """Return (score - median) / MAD, the critical value at which an image would be selected (Eq. 12)."""
    median = selection_threshold(scores, 0)
    return (scores - median) / max(selection_threshold(scores, 1) - median, 1e-12)


def selection_history(detector: Any) -> dict[str, list]:
    """Return a student's training history as one list per quantity, None where a stage does not have it."""
    history = getattr(detector, "history", None) or []
    if not history or "stage" not in history[0]:
        return {}
    keys = list(dict.fromkeys(key for row in history for key in row))
    return {key: [row.get(key) for row in history] for key in keys}


def _by_category(scores: np.ndarray, index: pd.DataFrame) -> pd.DataFrame:
    """Return image metrics per category, where both kinds of images are there, and their mean."""
    labels, found = index["label"].to_numpy(), []
    for name, rows in sorted(index.groupby("category").indices.items()):
        truth = labels[rows]
        if 0 < truth.sum() < len(truth):
            counts = {"n_normal": int((truth == 0).sum()), "n_anomalous": int(truth.sum())}
            found.append({"category": name, **image_metrics(truth, scores[rows]), **counts})
    table = pd.DataFrame(found, columns=["category", "auroc", "ap", "f1_max", "n_normal", "n_anomalous"])
    mean = table.drop(columns="category").mean().to_dict() if len(table) else {}
    return pd.concat([table, pd.DataFrame([{"category": "mean", **mean}] if mean else [])], ignore_index=True)


def reviewed(config: dict) -> pd.DataFrame:
    """Return MeDS's training images in the order of review, as Records: one row per image.

    Args:
        config: as for `meds_run`, with `method` "MeDS"; a complete checkpoint is only read.

    Returns:
        `rank, row` (of the training index), `category, defect, label, score, excess, selected`.
    """
    train, test, facts = contaminated(config)
    table = fitted(config, train, test).rank_for_review(train.index)
    table = table.assign(rank=np.arange(1, len(table) + 1))
    return table[["rank", "row", "category", "defect", "label", "score", "excess", "selected"]].assign(**facts)


def alone(student: dict, kind: str = "dinomaly") -> dict:
    """Return the setting of a student trained by itself, told no labels.

    Args:
        student: options of `StudentDetector`.
        kind: "dinomaly", "inpformer" or "hvq".
    """
    return {"method": "StudentDetector", "options": {"student": kind, **student}}


def with_meds(student: dict, meds: dict, kind: str = "dinomaly") -> dict:
    """Return the setting of MeDS on that student, told the product of every training image, as in the paper.

    Args:
        student: options of `StudentDetector`.
        meds: further options of `MeDS`.
        kind: "dinomaly", "inpformer" or "hvq".
    """
    return {"method": "MeDS", "labels": True, "options": {"student": kind, **student, **meds}}


def memory_alone(meds: dict) -> dict:
    """Return the setting of stage 1 as a detector, with the options of `meds` that concern it."""
    known = ("memory_layers", "ratio", "ensembles", "replacement", "memory_distance", "percent")
    return {
        "method": "BootstrappedMemory",
        "labels": True,
        "options": {key: meds[key] for key in known if key in meds},
    }


def banks(components: int, names: list[str]) -> list[dict]:
    """Return the settings of the methods without a student; patches of all but FUN-AD are reduced to `components`."""
    reduced = {"components": components}
    return [
        {"method": name, "options": BANKS[name], **({} if name == "FunAD" or not components else reduced)}
        for name in names
    ]


def default(option: str) -> Any:
    """Return the default of one of MeDS's options."""
    return inspect.signature(MeDS.__init__).parameters[option].default


def varied(meds: dict, option: str, value: Any) -> dict:
    """Return `meds` with one option set; unchanged where the value is the default, so that a run has one Record."""
    return meds if option not in meds and value == default(option) else {**meds, option: value}


def ablation(student: dict, meds: dict, kind: str = "dinomaly") -> dict[str, dict]:
    """Return the six settings of Tables 4 and 5, by the paper's description."""
    return {
        "Baseline": alone(student, kind),
        "Memory ensemble": memory_alone(meds),
        "Distilled model": with_meds(student, {**meds, "selection": False}, kind),
        "Fine-tuned with memory": with_meds(student, {**meds, "initialise": "random", "criterion": "memory"}, kind),
        "Random init fine-tune": with_meds(student, {**meds, "initialise": "random"}, kind),
        "MeDS": with_meds(student, meds, kind),
    }


def runs(base: dict, settings: list[dict], ratios: list[float], seeds: list[int]) -> list[dict]:
    """Return the configs of all settings at all noise ratios and seeds (of the noise and of the method).

    Args:
        base: what all share: data, encoder, sizes, and the draw.
        settings: from `alone`, `with_meds`, `memory_alone` or `banks`.
        ratios: injected anomalies per normal training image; they stay in the test set.
        seeds: a set of configs for each.
    """
    noise = {"definition": "per_normal", "overlap": True}
    return [
        {**base, **setting, "seed": seed, "noise": {**noise, "ratio": ratio, "seed": seed}}
        for seed in seeds
        for ratio in ratios
        for setting in settings
    ]
