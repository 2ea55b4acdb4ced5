"""The experiments behind the tables: a JSON config in, rows of a Record out.

Notebooks and sweeps call these through `hclib.evaluation.records.cached`, so that every number is computed once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd

from hclib.data.datasets import load_index
from hclib.evaluation import records
from hclib.evaluation.scenarios import evaluate
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores
from hclib.methods import HierCore, PatchCore

METHODS = {"PatchCore": PatchCore, "HierCore": HierCore}


@lru_cache(maxsize=4)
def dataset_features(dataset: str, encoder: str, image_size: int) -> Features:
    """Return the features of a whole data set, from the cache where they are there already."""
    return load_encoder(encoder, image_size).extract(load_index(dataset))


def split(features: Features) -> tuple[Features, Features]:
    """Return the training and the test part of a data set's features."""
    train = (features.index["split"] == "train").to_numpy()
    return features.subset(train), features.subset(~train)


def fit_and_score(config: dict) -> tuple[object, Scores, Features]:
    """Fit the detector of a config and score its test set.

    Args:
        config: `dataset, encoder, image_size, method, seed`; `train_labels` "known" or "unknown"; `test_labels` likewise
            (which bank an image goes to, not how thresholds are chosen); everything under `options` goes to the method.

    Returns:
        The detector, its scores, and the test features.
    """
    train, test = split(dataset_features(config["dataset"], config["encoder"], config["image_size"]))
    known = config.get("train_labels", "unknown") == "known"
    detector = METHODS[config["method"]](seed=config["seed"], **config.get("options", {}))
    detector.fit(train, list(train.index["category"]) if known else None)
    use = known and config.get("test_labels", "unknown") == "known"
    return detector, detector.score(test, list(test.index["category"]) if use else None), test


def label_scenario(config: dict) -> pd.DataFrame:
    """Return the F1 table of one detector under the threshold rules of `config["thresholds"]`.

    Returns:
        Rows of `evaluate`, one set per threshold rule, with the number of banks and their coreset entries.
    """
    detector, scores, test = fit_and_score(config)
    banks = getattr(detector, "banks", None) or [detector.bank]
    frames = [evaluate(scores, test.index, thresholds=rule, size=config["size"]) for rule in config["thresholds"]]
    return pd.concat(frames, ignore_index=True).assign(banks=len(banks), bank_entries=sum(len(b.points) for b in banks))


def cached_label_scenario(config: dict) -> pd.DataFrame:
    """Return `label_scenario(config)` from its Record, computing it where it is missing."""
    return records.cached("label_scenarios", config["profile"], config, lambda: label_scenario(config))


def scenario_configs(base: dict, seeds: list[int]) -> list[dict]:
    """Return the configs of HierCore's Tables 4 and 5: who knew the classes in training, and in scoring.

    Args:
        base: `profile, dataset, encoder, image_size, size, options`.
        seeds: one set of configs for each.
    """
    settings = [
        {"method": "PatchCore", "train_labels": "unknown", "test_labels": "unknown", "thresholds": ["class", "global"]},
        {"method": "HierCore", "train_labels": "unknown", "test_labels": "unknown", "thresholds": ["class", "global", "group"]},
        {"method": "HierCore", "train_labels": "known", "test_labels": "known", "thresholds": ["class"]},
        {"method": "HierCore", "train_labels": "known", "test_labels": "unknown", "thresholds": ["class", "global", "group"]},
    ]
    return [{**base, **setting, "seed": seed} for seed in seeds for setting in settings]


def pick_examples(index: pd.DataFrame, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of `count` anomalous images at evenly spaced ranks of their score, weakest to strongest."""
    rows = np.flatnonzero(index["label"].to_numpy() == 1)
    ranked = rows[np.argsort(np.asarray(scores)[rows], kind="stable")]
    return ranked[np.linspace(0, len(ranked) - 1, count).round().astype(int)]
