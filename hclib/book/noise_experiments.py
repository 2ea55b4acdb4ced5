"""The experiments of the chapter on contaminated training sets: a JSON config in, rows of a Record out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from hclib.book.experiments import METHODS, dataset_features, modules, split
from hclib.data.contamination import contaminate, realised
from hclib.evaluation import records
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.scenarios import evaluate
from hclib.images import read_masks
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores

METRICS = ["auroc", "ap", "f1_max", "aupro"]
NAMES = {"FunAD": "FUN-AD"}  # class -> name in the paper, where they differ
SHORT_FUNAD = {
    "epochs": 20,
    "learning_rate": 2e-4,
    "width": 128,
    "hidden": [256, 64],
    "refresh": None,
    "tokens": 64,
    "memory_patches": 4096,
}
"""FUN-AD on two cores: 20 epochs at ten times the rate, the product of the program's 200 epochs at 2e-5."""


def noisy_features(config: dict) -> tuple[Features, Features, pd.DataFrame]:
    """Return training and test features of a contaminated data set, and the manifest; nothing is encoded anew.

    Args:
        config: `dataset, encoder, image_size`; `layers`, those of the encoder's default ones that are used (all by
            default); `noise`, options of `contaminate` (none: the clean set); `components`, the number of principal
            components of the training patches that the patches are reduced to (all channels by default).
    """
    features = dataset_features(config["dataset"], config["encoder"], config["image_size"])
    if config.get("layers"):
        maps = {name: features.maps[name] for name in config["layers"]}
        encoder = features.encoder | {"layers": list(config["layers"])}
        features = Features(maps, features.tokens, features.index, encoder)
    noisy, manifest = contaminate(features.index, **{"ratio": 0, **config.get("noise", {})})
    train, test = split(features.align(noisy))
    if config.get("components"):
        train, test = reduce_channels(train, test, config["components"])
    return train, test, manifest


def reduce_channels(
    train: Features, test: Features, components: int, *, images: int = 100
) -> tuple[Features, Features]:
    """Return both with the patches of all layers, joined, reduced to principal components of the training patches.

    A rotation and a cut: distances shrink by what the left-out components hold, and searching costs less in proportion.

    Args:
        train: Features whose layers share one grid.
        test: the same layers.
        components: to keep.
        images: evenly spaced training images that the components are computed from.
    """

    def joined(part: Features, rows: slice | np.ndarray) -> torch.Tensor:
        return torch.cat([torch.from_numpy(np.asarray(maps[rows], np.float32)) for maps in part.maps.values()], 3)

    sample = np.unique(np.linspace(0, len(train) - 1, min(images, len(train))).astype(int))
    points = joined(train, sample).flatten(0, 2).double()
    mean = points.mean(0)
    values, vectors = torch.linalg.eigh((points - mean).T @ (points - mean))
    basis = vectors[:, -components:].flip(1).float()
    kept = float(values[-components:].sum() / values.sum())
    reduced = []
    for part in (train, test):
        blocks = [(joined(part, slice(i, i + 64)) - mean.float()) @ basis for i in range(0, len(part), 64)]
        maps = {f"pca{components}": torch.cat(blocks).numpy()}
        encoder = part.encoder | {"layers": list(maps), "variance_kept": round(kept, 4)}
        reduced.append(Features(maps, part.tokens, part.index, encoder))
    return reduced[0], reduced[1]


def recorded(experiment: str, config: dict, compute: Callable[[dict], pd.DataFrame]) -> pd.DataFrame:
    """Return the Records of `compute(config)`; as `hclib.book.experiments.recorded`, contamination's code included."""
    code = (*modules(config), "hclib.data.contamination")
    stored = records.load(experiment, config["profile"])
    stale = False
    if config["profile"] == "demo" and len(stored):
        stale = len(records.stale(stored[stored["config_hash"] == records.config_hash(config)])) > 0
    return records.cached(experiment, config["profile"], config, lambda: compute(config), refresh=stale, modules=code)


def patch_truth(features: Features) -> np.ndarray:
    """Return which patches are anomalous, (N, h, w) bool: masked on at least half their area, or the most masked."""
    grid = list(features.maps.values())[-1].shape[1]
    return read_masks(features.index, grid)


def epoch_criterion(test: Features) -> Callable[[Scores], float]:
    """Return what FUN-AD's authors choose the epoch by: the mean of image and pixel AUROC on the test set.

    Pixels are patches here, so that an epoch is judged in a second.
    """
    labels, truth = test.index["label"].to_numpy(), patch_truth(test).ravel()

    def criterion(scores: Scores) -> float:
        pixel = image_metrics(truth, scores.patch.ravel())["auroc"]
        return (image_metrics(labels, scores.image)["auroc"] + pixel) / 2

    return criterion


def training_aids(train: Features, test: Features) -> dict:
    """Return what FUN-AD's `fit` gets to be judged by in training: hidden labels, and a criterion on the test set.

    Without an anomalous test image there is no criterion, and no epoch can be chosen by it.
    """
    aids = {"truth": patch_truth(train)}
    if test.index["label"].nunique() == 2:
        aids |= {"validation": test, "criterion": epoch_criterion(test)}
    return aids


def fit_noisy(config: dict) -> tuple[dict[str, Scores], dict, Features]:
    """Fit the detector of a config on its contaminated training set and score its test set.

    Args:
        config: as for `noisy_features`, with `method`, `options`, `seed`; `synthetic`, the share of synthetic anomalies
            that FUN-AD gets beside the training images (none by default).

    Returns:
        Scores by epoch ("last", and "test" for FUN-AD, whose best epoch by test labels is kept beside the last one),
        facts (counts, seconds, FUN-AD's history as lists), and the test features.
    """
    train, test, manifest = noisy_features(config)
    counts = realised(manifest).loc["all"]
    detector = METHODS[config["method"]](seed=config["seed"], **config.get("options", {}))
    extra = {}
    if config["method"] == "FunAD":
        extra = training_aids(train, test)
        if config.get("synthetic"):
            from hclib.book.noise_synthesis import synthetic_features

            extra["synthetic"] = synthetic_features(train, config)
    start = time.perf_counter()
    detector.fit(train, **extra)
    fitted = time.perf_counter()
    scores = {"last": detector.score(test)}
    facts = {
        "train_normal": int(counts["normals"]),
        "train_anomalous": int(counts["moved"]),
        "realised_per_normal": float(counts["per_normal"]),
        "realised_of_total": float(counts["of_total"]),
        "variance_kept": train.encoder.get("variance_kept", 1.0),
        "fit_seconds": fitted - start,
        "score_seconds": time.perf_counter() - fitted,
    }
    if "validation" in extra:
        scores["test"] = detector.use("test").score(test)
    if extra:
        facts |= history_lists(detector.history)
    return scores, facts, test


def history_lists(history: list[dict[str, float]]) -> dict[str, list]:
    """Return a training history as one list per quantity, None where nothing could be measured."""
    keys = [key for key in history[0] if key != "epoch"]
    return {f"history_{k}": [None if math.isnan(row[k]) else float(row[k]) for row in history] for k in keys}


def noise_run(config: dict) -> pd.DataFrame:
    """Return the metrics of one detector trained on a contaminated set.

    Args:
        config: as for `fit_noisy`, with the pixel level's `size`; `common`: a ratio, so that metrics are also given on
            the test images that no run up to that ratio with the same noise seed trains on; `pixel`: false to leave
            that level out.

    Returns:
        One row per category (and "mean"), level, `epoch` and `test_set` ("own", "common").
    """
    scores, facts, test = fit_noisy(config)
    sets = {"own": np.ones(len(test), bool)}
    if config.get("common"):
        sets["common"] = common_rows(config, test.index)
    frames = []
    for epoch, found in scores.items():
        for name, rows in sets.items():
            part = test.index[rows].reset_index(drop=True)
            part.attrs = test.index.attrs
            frame = evaluate(found.subset(rows), part, size=config["size"], pixel=config.get("pixel", True))
            columns = ["category", "level", *METRICS, "n_normal", "n_anomalous"]
            frames.append(frame[columns].assign(epoch=epoch, test_set=name))
    rows = pd.concat(frames, ignore_index=True)
    lists = {key: facts.pop(key) for key in list(facts) if isinstance(facts[key], list)}
    rows = rows.assign(**facts)
    for key, values in lists.items():
        rows[key] = [values] + [None] * (len(rows) - 1)
    return rows


def common_rows(config: dict, index: pd.DataFrame) -> np.ndarray:
    """Return which test images stay in the test set up to the ratio `config["common"]`, without overlap, as bool."""
    clean = dataset_features(config["dataset"], config["encoder"], config["image_size"]).index
    noise = {**config["noise"], "ratio": config["common"], "overlap": False}
    left = contaminate(clean, **noise)[0]
    return index["path"].isin(left.loc[left["split"] == "test", "path"]).to_numpy()


def sweep_configs(base: dict, methods: dict[str, dict], ratios: list[float], seeds: list[int]) -> list[dict]:
    """Return the configs of a noise sweep: all ratios and methods of the first seed, then of the next.

    Args:
        base: what all share; its `noise` gets ratio and seed.
        methods: class name -> its options.
        ratios: noise ratios; the largest sets the common test images.
        seeds: of the noise and of the method.
    """
    return [
        {
            **{k: v for k, v in base.items() if k != "components" or name != "FunAD"},  # it has its own, `width`
            "method": name,
            "options": options,
            "noise": {**base["noise"], "ratio": ratio, "seed": seed},
            "common": max(ratios),
            "seed": seed,
        }
        for seed in seeds
        for ratio in ratios
        for name, options in methods.items()
    ]
