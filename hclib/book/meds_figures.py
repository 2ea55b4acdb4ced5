"""Figures of the MeDS chapter."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hclib.book.figures import ANOMALOUS, NORMAL, _image_axes, _square
from hclib.book.meds_experiments import best_size, omega, simulated_omega
from hclib.data.datasets import may_publish

SHADES = ["#0072B2", "#009E73", "#E69F00", "#CC79A7"]


def _ticks(axis: Axis, values: list[float]) -> None:
    """Label a logarithmic axis with plain numbers at these values only."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def weight_curves(shares: list[float], *, largest: int = 3000, memories: int = 20000, seed: int = 0) -> Figure:
    """Draw Theorem 1's weight over the memory size: the formula, its maximum, and what random draws give.

    Args:
        shares: pi, the share of features within reach, one curve each.
        largest: memory size at the right.
        memories: draws for each simulated point.
        seed: of the draws.
    """
    figure, ax = plt.subplots(figsize=(7.0, 3.0))
    sizes = np.geomspace(1, largest, 300)
    points = np.unique(np.geomspace(1, largest, 12).astype(int))
    for share, colour in zip(shares, SHADES, strict=False):
        top = omega(best_size(share), share)
        ax.plot(sizes, omega(sizes, share) / top, color=colour, label=f"{share:g}")
        simulated = simulated_omega(share, points.tolist(), memories, seed)
        ax.plot(points, simulated / top, "o", ms=3.5, mfc="white", color=colour)
        ax.axvline(best_size(share), color=colour, lw=0.8, ls=":")
    ax.set_xscale("log")
    _ticks(ax.xaxis, [1, 10, 100, 1000])
    ax.set_xlabel("features in the memory, m")
    ax.set_ylabel("weight ω(m, r), maximum 1")
    figure.legend(title="share of features within r", loc="outside right center")
    return figure


def separation_curves(results: pd.DataFrame) -> Figure:
    """Draw scores and their separation over the sampling ratio, a column per noise ratio (Figure 3).

    Args:
        results: Records of `low_pass`; categories are averaged.
    """
    noises = sorted(results["noise"].unique())
    figure, axes = plt.subplots(2, len(noises), figsize=(7.0, 4.4), sharex=True, sharey="row", squeeze=False)
    columns = [f"{kind}_{name}" for kind in ("mean", "low", "high") for name in ("normal", "anomalous")]
    aurocs = {"patch_auroc": "training patches", "train_auroc": "training images", "test_auroc": "test images"}
    aurocs["drawn_auroc"] = "training patches, memories drawn"
    for column, noise in enumerate(noises):
        means = results[results["noise"] == noise].groupby("ratio")[[*columns, *aurocs]].mean()
        top, bottom = axes[:, column]
        for name, colour in (("normal", NORMAL), ("anomalous", ANOMALOUS)):
            top.plot(means.index * 100, means[f"mean_{name}"], color=colour, label=f"{name} patches")
            band = (means[f"low_{name}"], means[f"high_{name}"])
            top.fill_between(means.index * 100, *band, color=colour, alpha=0.15, lw=0)
        for (key, label), style in zip(aurocs.items(), ("-", "--", ":", "-"), strict=True):
            colour = SHADES[1] if key == "drawn_auroc" else "black"
            bottom.plot(means.index * 100, means[key] * 100, style, color=colour, marker="o", ms=2.5, label=label)
        top.set_title(f"{noise * 100:g} % noise")
        top.set_xscale("log")
        _ticks(top.xaxis, [3, 10, 30, 100])
        bottom.set_xlabel("images in a memory in %")
    axes[0, 0].set_ylabel("score, 1 - cos")
    axes[1, 0].set_ylabel("AUROC in %")
    handles = [h for ax in axes[:, 0] for h in ax.get_legend_handles_labels()[0]]
    labels = [text for ax in axes[:, 0] for text in ax.get_legend_handles_labels()[1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5)
    return figure


def gap_curves(results: pd.DataFrame) -> Figure:
    """Draw the expected gap and its first-order part over the memory size, a line per category.

    Args:
        results: Records of `expected_gap`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0), sharex=True)
    panels = {"gap": "expected gap Δ(m)", "first_order": "its first-order part Δ₀(m)"}
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, results["category"].nunique()))
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for (name, part), colour in zip(results.groupby("category"), colours, strict=True):
            ax.plot(part["share"] * 100, part[column], color=colour, label=name.replace("_", " "))
        ax.axhline(0, color="grey", lw=0.8)
        ax.set_xscale("log")
        _ticks(ax.xaxis, [0.001, 0.01, 0.1, 1, 10, 100])
        ax.set_title(title)
        ax.set_xlabel("patches in the memory in %")
    axes[0].set_ylabel("L2 of normalised patches")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7.5)
    return figure


def agreement_curves(results: pd.DataFrame) -> Figure:
    """Draw the error of B memories against infinitely many, with the slope of 1 / sqrt(B).

    Args:
        results: Records of `limit_agreement`.
    """
    figure, ax = plt.subplots(figsize=(7.0, 3.0))
    for (replacement, rows), colour in zip(results.groupby("replacement"), (SHADES[2], SHADES[0]), strict=False):
        means = rows.groupby("memories")["mean_error"].agg(["mean", "min", "max"]) * 100
        label = "with replacement" if replacement else "without replacement"
        ax.plot(means.index, means["mean"], color=colour, marker="o", ms=3.5, label=label)
        ax.fill_between(means.index, means["min"], means["max"], color=colour, alpha=0.15, lw=0)
    sizes = np.array(sorted(results["memories"].unique()))
    start = results[results["memories"] == sizes[0]]["mean_error"].mean() * 100
    ax.plot(sizes, start * np.sqrt(sizes[0] / sizes), ":", color="grey", label="slope of 1 / √B")
    ax.set_xscale("log")
    ax.set_yscale("log")
    _ticks(ax.xaxis, sizes.tolist())
    _ticks(ax.yaxis, [1, 2, 5, 10, 20, 50])
    ax.set_xlabel("memories B")
    ax.set_ylabel("mean error in %\nof the mean score")
    ax.legend()
    return figure


def review_sheet(review: pd.DataFrame, *, count: int = 24, columns: int = 8, size: int = 128) -> Figure:
    """Draw the first images of a review in its order, with rank and excess; frames tell what they turned out to be.

    Args:
        review: from `MeDS.rank_for_review`, or a part of it with a column `rank`; where it knows labels, frames are
            orange for injected anomalies.
        count: images; those whose pixels may not be published are left out, and their products named below.
        columns: images in a row.
        size: side of a thumbnail in pixels.
    """
    allowed = may_publish(review)
    shown, hidden = review[allowed].head(count), review.loc[~allowed, "category"].unique()
    ranks = review["rank"] if "rank" in review else pd.Series(range(1, len(review) + 1), review.index)
    lines = max(1, -(-len(shown) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(7.0, 1.15 * lines + 0.2), squeeze=False)
    _image_axes(axes)
    for ax, (row, item) in zip(axes.flat, shown.iterrows(), strict=False):
        ax.imshow(_square(item["path"], size))
        ax.set_title(f"{ranks[row]}: {item['excess']:.1f}", fontsize=6, pad=2)
        for spine in ax.spines.values():
            spine.set(visible=True, linewidth=2, color=ANOMALOUS if item.get("label", 0) else NORMAL)
    if len(hidden):
        figure.supxlabel("left out (licence): " + ", ".join(sorted(hidden)).replace("_", " "), fontsize=7)
    return figure
