"""The experiments behind the tables: a JSON config in, rows of a Record out.

Notebooks and sweeps call these through `hclib.evaluation.records.cached`, so that every number is computed once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from hclib import methods
from hclib.data.datasets import load_index
from hclib.evaluation import records
from hclib.evaluation.results import save_results
from hclib.evaluation.scenarios import evaluate, evaluate_rules
from hclib.images import read_masks
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores
from hclib.paths import cache_dir, repository

GROUP_RULES = ["class/class", "global/class", "group/class", "group/cluster"]  # thresholds / aggregation of F1
METHODS = {name: getattr(methods, name) for name in methods.__all__}


def dataset_features(dataset: str, encoder: str, image_size: int, layers: Sequence[str] | None = None) -> Features:
    """Return the features of a data set, from the cache where they are there already.

    Args:
        dataset: a name or path for `load_index`; `NAME:CATEGORY` takes one category of it.
        encoder: name for `load_encoder`.
        image_size: side in pixels.
        layers: of the encoder; None takes its default ones.
    """
    return _dataset_features(dataset, encoder, image_size, tuple(layers) if layers else None)


@lru_cache(maxsize=4)
def _dataset_features(dataset: str, encoder: str, image_size: int, layers: tuple[str, ...] | None) -> Features:
    name, _, category = dataset.partition(":")
    index = load_index(name, categories=[category] if category else None)
    return load_encoder(encoder, image_size, layers=layers).extract(index)


def features_of(config: dict) -> Features:
    """Return the features that a config names by `dataset, encoder, image_size` and, optionally, `layers`."""
    return dataset_features(config["dataset"], config["encoder"], config["image_size"], config.get("layers"))


def split(features: Features) -> tuple[Features, Features]:
    """Return the training and the test part of a data set's features."""
    train = (features.index["split"] == "train").to_numpy()
    return features.subset(train), features.subset(~train)


def fit_and_score(config: dict) -> tuple[Scores, dict, Features]:
    """Fit the detector of a config and score its test set; the scores are cached on disk.

    Args:
        config: `dataset, encoder, image_size, method` (a class of `hclib.methods`), `seed`; `train_labels` "known" or
            "unknown"; `test_labels` likewise (which bank an image goes to, not how thresholds are chosen); `layers` of
            the encoder, where not its default ones; `train_per_category`, images kept of each training category (a
            seeded draw); `flip`, share of the known training labels that are replaced by another category's; everything
            under `options` goes to the method.

    Returns:
        The scores, what fitting gave and took (`banks, bank_entries, fit_seconds, score_seconds`; encoding is not in
        the seconds), and the test features.
    """
    train, test = split(features_of(config))
    keys = ["dataset", "encoder", "image_size", "layers", "method", "train_labels", "test_labels", "seed", "options"]
    keys += [key for key in ("train_per_category", "flip") if key in config]
    name = records.config_hash({k: config.get(k) for k in keys}) + "-" + records.source_hash(modules=modules(config))
    store = cache_dir() / "scores" / name
    if store.with_suffix(".json").is_file():
        return Scores.load(store.with_suffix(".safetensors")), json.loads(store.with_suffix(".json").read_text()), test
    known = config.get("train_labels", "unknown") == "known"
    if "train_per_category" in config:
        train = draw_per_category(train, config["train_per_category"], config["seed"])
    labels = flip_labels(train.index["category"], config.get("flip", 0), config["seed"])
    start = time.perf_counter()
    detector = METHODS[config["method"]](seed=config["seed"], **config.get("options", {}))
    detector.fit(train, labels if known else None)
    fitted = time.perf_counter()
    use = config.get("test_labels", "unknown") == "known"
    scores = detector.score(test, list(test.index["category"]) if use else None)
    banks = getattr(detector, "banks", None) or [bank for bank in [getattr(detector, "bank", None)] if bank is not None]
    facts = {
        "banks": len(banks),
        "bank_entries": sum(len(bank.points) for bank in banks),
        "fit_seconds": fitted - start,
        "score_seconds": time.perf_counter() - fitted,
    }
    store.parent.mkdir(parents=True, exist_ok=True)
    scores.save(store.with_suffix(".safetensors"))
    store.with_suffix(".json").write_text(json.dumps(facts))
    return scores, facts, test


def save_run(config: dict, folder: str) -> None:
    """Write the results of a `scenario_metrics` config as files: configuration, metrics, decisions, timing.

    Args:
        config: as for `scenario_metrics`.
        folder: relative to the checkout, or absolute; the run goes to a folder of its own in it.
    """
    scores, facts, test = fit_and_score(config)
    name = "-".join(str(config[key]) for key in ("method", "train_labels", "test_labels", "seed"))
    rules = [tuple(rule.split("/")) for rule in config["rules"]]
    target = (repository() or Path.cwd()) / folder / name
    save_results(target, scores, test.index, config=config, timing=facts, rules=rules, size=config["size"])


def draw_per_category(features: Features, count: int, seed: int) -> Features:
    """Return at most `count` images of every category, drawn by `seed`, in their order."""
    rng, kept = np.random.default_rng(seed), []
    for _, rows in sorted(features.index.groupby("category").indices.items()):
        kept.append(rng.permutation(rows)[:count])
    return features.subset(np.sort(np.concatenate(kept)))


def flip_labels(labels: Sequence[str], share: float, seed: int) -> list[str]:
    """Return the labels, `share` of them replaced by another class, each with equal chance."""
    rng, labels = np.random.default_rng(seed), np.array(labels, dtype=object)
    names = sorted(set(labels))
    for row in rng.permutation(len(labels))[: round(share * len(labels))]:
        labels[row] = rng.choice([name for name in names if name != labels[row]])
    return labels.tolist()


def scenario_metrics(config: dict) -> pd.DataFrame:
    """Return the metrics of one detector under every threshold rule of `config["rules"]`.

    Args:
        config: as for `fit_and_score`, with `rules` ("thresholds/aggregate" of `evaluate`), the `size` of the pixel
            level, and `pixel`: false to leave that level out.

    Returns:
        Rows of `evaluate`, one set per rule, with the facts of `fit_and_score`.
    """
    scores, facts, test = fit_and_score(config)
    rules = [tuple(rule.split("/")) for rule in config["rules"]]
    frames = evaluate_rules(scores, test.index, rules, size=config["size"], pixel=config.get("pixel", True))
    return pd.concat(frames, ignore_index=True).assign(**facts)


def label_scenario(config: dict) -> pd.DataFrame:
    """Return `scenario_metrics` with the image scores themselves, for figures.

    Returns:
        The image rows under the first rule also hold two sorted lists, `normal_scores` and `anomalous_scores`.
    """
    scores, _, test = fit_and_score(config)
    rows = scenario_metrics(config)
    thresholds, aggregate = config["rules"][0].split("/")
    first = (rows["thresholds"] == thresholds) & (rows["aggregate"] == aggregate)
    lists = score_lists(scores.image, test.index)
    return pd.concat([rows[first].merge(lists, on=["category", "level"], how="left"), rows[~first]], ignore_index=True)


def one_class(config: dict) -> pd.DataFrame:
    """Return the metrics of one PatchCore per category, each seeing only its own category (the one-class setting).

    Args:
        config: as for `fit_and_score`; `dataset` without a category.
    """
    _, test = split(features_of(config))
    categories = sorted(test.index["category"].unique())
    parts = [fit_and_score({**config, "dataset": f"{config['dataset']}:{name}"}) for name in categories]
    frames = [evaluate(scores, part.index, size=config["size"]) for scores, _, part in parts]
    rows = pd.concat(frames, ignore_index=True).query("category != 'mean'")
    metrics = ["f1", "auroc", "ap", "f1_max", "aupro", "iou_max"]
    means = rows.groupby("level")[metrics].mean().reset_index().assign(category="mean")
    facts = pd.DataFrame([facts for _, facts, _ in parts]).sum().to_dict()
    return pd.concat([rows, means], ignore_index=True).assign(**facts)


def pixel_histograms(config: dict) -> pd.DataFrame:
    """Return the distribution of pixel scores per category, normal and anomalous, on common bins.

    Args:
        config: as for `fit_and_score`, with `size` and `bins`.

    Returns:
        One row per category: `edges` (bins + 1), `normal` and `anomalous` (bins) as lists of counts; the last bin holds
        everything above the 99.9 % quantile of the patch scores.
    """
    scores, _, test = fit_and_score(config)
    edges = np.linspace(0, np.quantile(scores.patch, 0.999), config["bins"] + 1)
    rows = []
    for category, members in test.index.groupby("category").indices.items():
        counts = np.zeros((2, config["bins"]), np.int64)
        for start in range(0, len(members), 64):
            part = members[start : start + 64]
            values = np.clip(scores.subset(part).upsample(config["size"]), 0, edges[-1])
            masks = read_masks(test.index.iloc[part], config["size"])
            counts += [np.histogram(values[masks == flag], edges)[0] for flag in (False, True)]
        rows.append({"category": category, "edges": edges.tolist()})
        rows[-1] |= {"normal": counts[0].tolist(), "anomalous": counts[1].tolist()}
    return pd.DataFrame(rows)


def score_lists(image: np.ndarray, index: pd.DataFrame) -> pd.DataFrame:
    """Return the image scores of every category as two sorted lists, normal and anomalous."""
    rows = []
    for category, members in index.groupby("category").indices.items():
        normal = index["label"].to_numpy()[members] == 0
        values = [np.sort(image[members][part]).astype(float).tolist() for part in (normal, ~normal)]
        rows.append({"category": category, "level": "image", "normal_scores": values[0], "anomalous_scores": values[1]})
    return pd.DataFrame(rows)


def recorded(experiment: str, config: dict, compute: Callable[[dict], pd.DataFrame]) -> pd.DataFrame:
    """Return the Records of `compute(config)`, computing them where they are missing.

    Under the profile "demo" Records made by other code than today's are computed anew; under the others, where that
    takes hours, they are kept and the status page counts them.
    """
    profile, stored = config["profile"], records.load(experiment, config["profile"])
    if profile == "demo" and len(stored):
        stored = stored[stored["config_hash"] == records.config_hash(config)]
        stale = len(records.stale(stored)) > 0
    else:
        stale = False
    return records.cached(experiment, profile, config, lambda: compute(config), refresh=stale, modules=modules(config))


def modules(config: dict) -> tuple[str, ...]:
    """Return the modules whose source decides the numbers of a config; a rendered data set is one of them."""
    method = METHODS[config.get("method", "HierCore")].__module__
    found = ("hclib.evaluation.scenarios", "hclib.kernels.encoders", method)
    return (*found, "hclib.data.demo") if config["dataset"].startswith("demo") else found


def scenario_configs(base: dict, seeds: list[int]) -> list[dict]:
    """Return the configs of HierCore's Tables 4 and 5: who knew the classes in training, and in scoring.

    Args:
        base: `profile, dataset, encoder, image_size, size, options`.
        seeds: one set of configs for each.
    """
    settings = [
        {
            "method": "PatchCore",
            "train_labels": "unknown",
            "test_labels": "unknown",
            "rules": ["class/class", "global/class"],
        },
        {"method": "HierCore", "train_labels": "unknown", "test_labels": "unknown", "rules": GROUP_RULES},
        {"method": "HierCore", "train_labels": "known", "test_labels": "known", "rules": ["class/class"]},
        {"method": "HierCore", "train_labels": "known", "test_labels": "unknown", "rules": GROUP_RULES},
    ]
    return [{**base, **setting, "seed": seed} for seed in seeds for setting in settings]


def pick_examples(index: pd.DataFrame, scores: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of `count` anomalous images at evenly spaced ranks of their score, weakest to strongest."""
    rows = np.flatnonzero(index["label"].to_numpy() == 1)
    ranked = rows[np.argsort(np.asarray(scores)[rows], kind="stable")]
    return ranked[np.linspace(0, len(ranked) - 1, count).round().astype(int)]
