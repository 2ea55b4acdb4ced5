"""Figures of the chapter on contaminated training sets."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from hclib.book.figures import METHOD_COLOURS
from hclib.book.noise_tables import ORDER, named, paper_table1


def _colour(method: str) -> str:
    return METHOD_COLOURS[method.split(",")[0]]


def sweep_curves(results: pd.DataFrame, *, test_set: str = "common", paper: bool = True) -> Figure:
    """Draw AUROC over the noise ratio, image and pixel level, ours solid with the range over seeds, the paper's dotted.

    Args:
        results: Records of `noise_run`.
        test_set: "own" or "common".
        paper: also draw FUN-AD's Table 1.
    """
    rows = named(results).query("category == 'mean' and test_set == @test_set")
    printed = paper_table1()
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.4))
    for ax, level in zip(axes, ("image", "pixel"), strict=True):
        for method in [m for m in ORDER if m in set(rows["method"])]:
            mine = rows[(rows["level"] == level) & (rows["method"] == method)].groupby("noise")["auroc"]
            style = "--" if "best" in method else "-"
            mean = mine.mean() * 100
            ax.plot(mean.index, mean, style, color=_colour(method), marker="o", ms=3, label=method)
            if mine.size().max() > 1:
                ax.fill_between(mean.index, mine.min() * 100, mine.max() * 100, color=_colour(method), alpha=0.15, lw=0)
            theirs = printed[(printed["method"] == method) & (printed["level"] == level)]
            if paper and "best" not in method and len(theirs):
                ax.plot(theirs["noise"], theirs["paper"], ":", color=_colour(method), lw=1)
        ax.set_xlabel("injected anomalies per normal image in %")
        ax.set_title(f"{level} level")
    axes[0].set_ylabel("AUROC in %")
    handles, labels = axes[0].get_legend_handles_labels()
    if paper:
        handles.append(plt.Line2D([], [], color="grey", ls=":"))
        labels.append("the paper's, same colour")
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7.5)
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Draw FUN-AD's loss, pseudo-label precision, memory purity and criterion over its epochs, a line per ratio.

    Args:
        history: `noise_tables.training_history`; seeds are averaged.
    """
    panels = {
        "loss": "loss",
        "precision": "pseudo-label precision",
        "memory_purity": "normal share of the memory",
        "criterion": "mean of image and\npixel AUROC (test labels)",
    }
    figure, axes = plt.subplots(2, 2, figsize=(7.0, 4.4), sharex=True)
    ratios = sorted(history["noise"].unique())
    colours = plt.get_cmap("viridis")([i / max(1, len(ratios) - 1) * 0.9 for i in range(len(ratios))])
    for ax, (column, title) in zip(axes.flat, panels.items(), strict=True):
        for ratio, colour in zip(ratios, colours, strict=True):
            mean = history[history["noise"] == ratio].groupby("epoch")[column].mean()
            ax.plot(mean.index + 1, mean, color=colour, label=f"{ratio:g} %")
        ax.set_ylabel(title)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7.5)
    return figure
