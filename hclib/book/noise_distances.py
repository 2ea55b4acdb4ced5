"""Pairwise distances between normal and anomalous features: FUN-AD's Figure 1, synthetic and real."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.figures import ANOMALOUS, NORMAL
from hclib.book.noise_experiments import noisy_features, patch_truth
from hclib.evaluation.metrics import image_metrics
from hclib.kernels.distances import full_precision

PAIRS = {"NN": "normal-normal", "AN": "anomalous-normal", "AA": "anomalous-anomalous"}
COLOURS = {"NN": NORMAL, "AN": "#E69F00", "AA": ANOMALOUS}


def pair_distances(normal: torch.Tensor, anomalous: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the L2 distances of all pairs of two sets, each unordered pair once and none with itself.

    Args:
        normal: (n, C) floating point.
        anomalous: (m, C).

    Returns:
        `NN` (n (n - 1) / 2,), `AN` (n m,) and `AA` (m (m - 1) / 2,), float32.
    """
    found = {}
    with full_precision(normal.device):
        for name, left, right in (("NN", normal, normal), ("AN", anomalous, normal), ("AA", anomalous, anomalous)):
            table = torch.cdist(left.double(), right.double())
            if left is right:
                table = table[tuple(torch.triu_indices(len(left), len(left), 1))]
            found[name] = table.flatten().float().numpy()
    return found


def gaussian_sets(count: int, channels: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the supplement's synthetic sets: N(0, I) and N(1.5, 2 I), `count` vectors of `channels` each."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, channels, generator=generator)
    return normal, 1.5 + 2**0.5 * torch.randn(count, channels, generator=generator)


def feature_sets(config: dict, category: str, level: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normal and anomalous features of a category: image tokens, or patches of the last layer.

    Normal are the training images, anomalous the test images, at patch level their masked patches; at most `limit` of
    each are drawn.
    """
    train, test, _ = noisy_features(config)
    normal = train.subset((train.index["category"] == category).to_numpy())
    bad = test.subset(((test.index["category"] == category) & (test.index["label"] == 1)).to_numpy())
    generator = np.random.default_rng([config["seed"], *category.encode()])
    if level == "image":
        sets = [torch.from_numpy(np.asarray(part.tokens, np.float32)) for part in (normal, bad)]
    else:
        every = [list(part.maps.values())[-1] for part in (normal, bad)]
        values = [np.asarray(maps, np.float32).reshape(-1, maps.shape[-1]) for maps in every]
        values[1] = values[1][patch_truth(bad).ravel()]
        sets = [torch.from_numpy(rows) for rows in values]
    return tuple(rows[np.sort(generator.permutation(len(rows))[: config["limit"]])] for rows in sets)


def distance_run(config: dict) -> pd.DataFrame:
    """Return, for every category and level of a data set and for the synthetic sets, how the three kinds compare.

    Args:
        config: as for `noisy_features`, with `seed`, `limit` (vectors of each kind) and `bins` of the histograms.

    Returns:
        One row each: medians of the kinds over that of NN, `an_longer` and `aa_longer`, the chance that such a pair is
        longer than a normal one (0.5: no difference), and histograms as lists.
    """
    _, test, _ = noisy_features(config)
    jobs = {("gaussian", "synthetic"): gaussian_sets(min(1000, config["limit"]), 16, config["seed"])}
    for category in sorted(test.index["category"].unique()):
        jobs |= {(category, level): feature_sets(config, category, level) for level in ("image", "patch")}
    return pd.DataFrame([_row(*key, *sets, config["bins"]) for key, sets in jobs.items()])


def _row(category: str, level: str, normal: torch.Tensor, anomalous: torch.Tensor, bins: int) -> dict:
    found = pair_distances(normal, anomalous)
    top = max(float(np.quantile(values, 0.999)) for values in found.values())
    edges = np.linspace(0, top, bins + 1)
    row = {"category": category, "level": level, "normal": len(normal), "anomalous": len(anomalous)}
    for name in ("AN", "AA"):
        labels = np.r_[np.zeros(len(found["NN"]), bool), np.ones(len(found[name]), bool)]
        longer = image_metrics(labels, np.r_[found["NN"], found[name]])["auroc"]
        row |= {
            f"{name.lower()}_longer": longer,
            f"{name.lower()}_median": np.median(found[name]) / np.median(found["NN"]),
        }
    row["edges"] = edges.tolist()
    for name, values in found.items():
        density = np.histogram(np.minimum(values, top), edges)[0] / len(values)
        row[f"share_{name}"] = density.tolist()
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()}


def distance_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return medians and chances, a row per level and category."""
    columns = ["normal", "anomalous", "an_median", "aa_median", "an_longer", "aa_longer"]
    table = results.set_index(["level", "category"])[columns].round(3)
    return table.rename(
        columns={
            "an_median": "AN / NN",
            "aa_median": "AA / NN",
            "an_longer": "P(AN > NN)",
            "aa_longer": "P(AA > NN)",
        }
    )


def histograms(results: pd.DataFrame, category: str) -> Figure:
    """Draw Figure 1's three panels: the synthetic sets, and image and patch features of one category."""
    panels = [("gaussian", "synthetic"), (category, "image"), (category, "patch")]
    figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.7))
    for ax, (name, level) in zip(axes, panels, strict=True):
        row = results[(results["category"] == name) & (results["level"] == level)].iloc[0]
        for kind, label in PAIRS.items():
            ax.stairs(row[f"share_{kind}"], row["edges"], color=COLOURS[kind], label=label, lw=1.3)
        ax.set_title(f"{level}: {name}".replace("_", " "))
        ax.set_xlabel("L2 distance")
        ax.set_yticks([])
    axes[0].set_ylabel("share of pairs")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def chances(results: pd.DataFrame) -> Figure:
    """Draw, for every category and level, the chance that a pair with an anomaly is longer than a normal pair."""
    rows = results[results["level"] != "synthetic"].sort_values(["level", "category"])
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 0.9 + 0.3 * rows["category"].nunique()), sharey=True, sharex=True)
    for ax, (level, part) in zip(axes, rows.groupby("level"), strict=True):
        names = part["category"].str.replace("_", " ")
        for kind, marker in (("AN", "o"), ("AA", "s")):
            ax.plot(part[f"{kind.lower()}_longer"], names, marker, color=COLOURS[kind], label=PAIRS[kind])
        ax.axvline(0.5, color="grey", ls=":", lw=1)
        ax.set_title(f"{level} features")
        ax.set_xlabel("chance to be longer than a normal pair")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def distance_verdicts(results: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test the supplement's claim at each level, on every category, and record it."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    verdicts = []
    for level in ("synthetic", "image", "patch"):
        rows = results[results["level"] == level].set_index("category")
        both = (rows[["an_longer", "aa_longer"]] > 0.5).all(axis=1)
        worst = rows["aa_longer"].idxmin()
        evidence = f"P(AN > NN) {rows['an_longer'].min():.2f}, P(AA > NN) {rows['aa_longer'].min():.2f}"
        if level != "synthetic":
            evidence = (
                f"P(AN > NN) {rows['an_longer'].min():.2f} to {rows['an_longer'].max():.2f}, P(AA > NN) "
                f"{rows['aa_longer'].min():.2f} ({worst}) to {rows['aa_longer'].max():.2f}"
            )
            evidence += f"; holds in {int(both.sum())} of {len(both)} categories ({base['dataset']}, {base['encoder']})"
        verdicts.append(
            report.claim(
                f"normal-pairs-shortest-{level}",
                f"Pairs of normal features are shorter than pairs with anomalies, at {level} level."
                if level != "synthetic"
                else "Pairs of normal features are shorter than pairs with anomalies, for the synthetic Gaussians.",
                bool(both.all()),
                evidence + ".",
                source="FUN-AD, supplement, section 1 and Figure 1",
                **keys,
            )
        )
    return verdicts
