"""Figures of MuSc's pages."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hclib.book.figures import ANOMALOUS, METHOD_COLOURS, NORMAL, _image_axes, _square
from hclib.data.datasets import may_publish
from hclib.kernels.maps import upsample

KINDS = {"normal": NORMAL, "anomalous": ANOMALOUS}
LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def score_histograms(results: pd.DataFrame) -> Figure:
    """Draw the image scores of every category, normal against anomalous, before (left) and after RsCIN (right)."""
    levels = {"image without RsCIN": "before RsCIN", "image": "after RsCIN"}
    rows = results[results["level"].isin(list(levels))].set_index(["category", "level"])
    categories = list(dict.fromkeys(rows.index.get_level_values(0)))
    figure, axes = plt.subplots(len(categories), 2, figsize=(7.0, 0.8 * len(categories) + 0.7), squeeze=False)
    for i, category in enumerate(categories):
        both = [rows.loc[(category, level)] for level in levels]
        edges = np.histogram_bin_edges(np.concatenate([row["image_scores"] for row in both]), 30)
        for ax, row in zip(axes[i], both, strict=True):
            for kind, colour in KINDS.items():
                ax.hist(row[f"{kind}_scores"], edges, color=colour, alpha=0.6, label=kind)
            ax.set_yticks([])
            ax.tick_params(labelsize=7)
            ax.text(0.99, 0.95, f"AUROC {row['auroc']:.3f}", transform=ax.transAxes, ha="right", va="top", fontsize=7.5)
        axes[i, 0].set_ylabel(category.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    for ax, title in zip(axes[0], levels.values(), strict=True):
        ax.set_title(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=7.5)
    figure.supxlabel("image score (L2)", fontsize=9)
    return figure


def example_maps(index: pd.DataFrame, examples: pd.DataFrame, size: int = 224) -> Figure:
    """Draw the maps of a category's examples, weakest to strongest anomaly, then normal images.

    Where the images may be published, they stand above their maps with the defect outlined; otherwise only the maps are
    drawn. All maps share one colour scale.

    Args:
        index: index frame of the pile that `examples` counts its rows in.
        examples: Records of `musc_experiments.examples`.
        size: side of the drawn maps in pixels.
    """
    from hclib.images import read_mask, resize_mask

    chosen = index.iloc[examples["row"].to_numpy()]
    shown = bool(may_publish(chosen).all())
    side = round(len(examples["patch"].iloc[0]) ** 0.5)
    patch = np.stack(examples["patch"]).astype(np.float32).reshape(-1, side, side)
    maps, height = upsample(patch, size, align_corners=True), 2 if shown else 1
    figure, axes = plt.subplots(height, len(chosen), figsize=(7.0, 7.0 / len(chosen) * height + 0.35), squeeze=False)
    limits = {"vmin": float(np.quantile(patch, 0.05)), "vmax": float(patch.max()), "cmap": "inferno"}
    for column, (item, values, found) in enumerate(zip(chosen.itertuples(), maps, examples.itertuples(), strict=True)):
        axes[-1, column].imshow(values, **limits)
        if shown:
            axes[0, column].imshow(_square(item.path, size))
            if item.mask_path:
                outline = resize_mask(read_mask(item.mask_path), size)
                axes[0, column].contour(outline, [0.5], colors=ANOMALOUS, linewidths=1)
        kind = item.defect.replace("_", "\n", 1) if found.label else "normal"
        axes[0, column].set_title(f"{kind}\n{found.image_score:.3f}", fontsize=7)
    _image_axes(axes)
    return figure


def sweep(
    frames: dict[str, pd.DataFrame],
    x: str,
    labels: dict[str, str],
    *,
    logarithmic: bool = False,
    guide: float | None = None,
    shared: bool = False,
) -> Figure:
    """Draw AUROC over a parameter: a thin line per category, a thick one for their mean, a panel per measure.

    Args:
        frames: title of a panel -> rows with `category`, `auroc` and the column `x` (numbers).
        x: the parameter.
        labels: title of a panel -> label of its x axis.
        logarithmic: whether the x axis is.
        guide: x of a dotted vertical line: the method's default.
        shared: whether the panels share the AUROC axis.
    """
    figure, axes = plt.subplots(1, len(frames), figsize=(7.0, 3.2), squeeze=False, sharey=shared)
    for ax, (title, rows) in zip(axes[0], frames.items(), strict=True):
        lines = rows.groupby([x, "category"])["auroc"].mean().unstack() * 100
        for colour, (category, values) in zip(LINES, lines.items(), strict=False):
            values = values.dropna()
            ax.plot(values.index, values, color=colour, linewidth=1, alpha=0.75, marker=".", label=category)
        mean = lines.dropna().mean(axis=1)
        ax.plot(mean.index, mean, color=METHOD_COLOURS["MeDS"], linewidth=2.4, label="mean")
        if guide is not None:
            ax.axvline(guide, color="grey", linestyle=":", linewidth=1.2)
        if logarithmic:
            ax.set_xscale("log")
            ax.set_xticks(lines.index, [f"{v:g}" for v in lines.index])
            ax.minorticks_off()
        ax.set_title(title)
        ax.set_xlabel(labels[title])
    axes[0, 0].set_ylabel("AUROC (%)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles[0], [t.replace("_", " ") for t in handles[1]], loc="outside lower center", ncols=4, fontsize=7.5
    )
    return figure


def patch_score_histograms(rows: pd.DataFrame) -> Figure:
    """Draw Figure 4: distances from patches to images (top), and their averages (bottom), normal against anomalous.

    Args:
        rows: Records of `musc_experiments.patch_histograms` of one category.
    """
    figure, axes = plt.subplots(2, 2, figsize=(7.0, 4.4))
    panels = [
        ("(a) normal patches to all other images", [("distances", "normal")]),
        ("(b) anomalous patches to all other images", [("distances", "anomalous")]),
        ("(c) mean over all images", [("mean of all", kind) for kind in KINDS]),
        ("(d) mean over the nearest 30 %", [("mean of the nearest 30 %", kind) for kind in KINDS]),
    ]
    for ax, (title, parts) in zip(axes.flat, panels, strict=True):
        for quantity, kind in parts:
            row = rows[(rows["quantity"] == quantity) & (rows["kind"] == kind)].iloc[0]
            share = np.asarray(row["counts"]) / max(1, np.sum(row["counts"])) * 100
            ax.stairs(share, row["edges"], color=KINDS[kind], fill=True, alpha=0.6, label=kind)
        text = f"overlap {row['overlap']:.0%}" if len(parts) > 1 else ""
        ax.set_title(f"{title}\n{text}" if text else title)
        ax.legend(fontsize=7.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of patches (%)")
    for ax in axes[1]:
        ax.set_xlabel("distance (L2)")
    return figure


def growth(rows: pd.DataFrame) -> Figure:
    """Draw seconds and extra memory of mutual scoring over the number of images, for both ways of computing it."""
    names = {"mutual_scores": "pairs multiplied once", "each against all": "each image against all"}
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.9))
    for ax, column, label in zip(
        axes, ("cpu_seconds", "extra_mb"), ("CPU seconds per layer and degree", "extra memory (MB)"), strict=True
    ):
        for colour, (way, text) in zip(
            (METHOD_COLOURS["MuSc"], METHOD_COLOURS["PatchCore"]), names.items(), strict=True
        ):
            mine = rows[rows["way"] == way].sort_values("images")
            ax.plot(mine["images"], mine[column], marker="o", color=colour, label=text)
        ax.set_xlabel("images N")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0].legend(fontsize=7.5)
    return figure


def turn_points(table: pd.DataFrame) -> Figure:
    """Draw image AUROC per category in the four ways of `musc_extensions.TURNS`.

    Args:
        table: `turn_table` without its mean.
    """
    from hclib.book.musc_extensions import TURNS

    figure, ax = plt.subplots(figsize=(7.0, 3.0))
    looks = zip(
        TURNS, (LINES[0], LINES[0], LINES[1], LINES[1]), ("o", "*", "o", "*"), (-0.15, -0.05, 0.05, 0.15), strict=True
    )
    for way, colour, marker, shift in looks:
        place = np.arange(len(table)) + shift
        ax.plot(place, table[way], marker, color=colour, markersize=11 if marker == "*" else 7, label=way)
    ax.set_xticks(range(len(table)), [str(name).replace("_", "\n") for name in table.index])
    ax.set_xlim(-0.5, len(table) - 0.5)
    ax.set_ylabel("image AUROC (%)")
    figure.legend(loc="outside upper center", ncols=4, fontsize=7.5)
    return figure
