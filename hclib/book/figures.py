"""Figures of the book: one palette, one size, one way to lay a heat map over an image."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hclib.data.datasets import may_publish
from hclib.images import read_image, read_mask, resize_mask

# Okabe and Ito's colour-blind-safe palette; a method keeps its colour throughout the book.
METHOD_COLOURS = {
    "PatchCore": "#D55E00",
    "HierCore": "#0072B2",
    "MuSc": "#009E73",
    "SoftPatch": "#CC79A7",
    "InReaCh": "#E69F00",
    "FUN-AD": "#56B4E9",
    "MeDS": "#000000",
}
NORMAL, ANOMALOUS = "#0072B2", "#D55E00"


def use_style() -> None:
    """Set the book's matplotlib style: 100 dpi, 7 inches wide, light grid, readable fonts."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.figsize": (7.0, 3.6),
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.titlesize": 9,
            "legend.frameon": False,
        }
    )


def _image_axes(axes: Sequence) -> None:
    for ax in np.ravel(axes):
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        for spine in ax.spines.values():
            spine.set_visible(False)


def _square(path: str, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(read_image(path)).resize((size, size), Image.Resampling.LANCZOS))


def contact_sheet(index: pd.DataFrame, *, columns: int = 8, size: int = 128, seed: int = 0) -> Figure:
    """Draw one row per category: half normal, half anomalous test images, the masks outlined.

    Categories whose pixels may not be published are left out and named in the title.

    Args:
        index: index frame of any data set.
        columns: images per category.
        size: side of a thumbnail in pixels.
        seed: which images are drawn.
    """
    allowed = may_publish(index)
    hidden = sorted(index.loc[~allowed, "category"].unique())
    shown = index[allowed & (index["split"] == "test")]
    categories = sorted(shown["category"].unique())
    if not categories:
        figure = plt.figure(figsize=(7.0, 0.4))
        figure.text(0, 0.4, "not shown (licence): " + ", ".join(hidden), fontsize=8)
        return figure
    figure, axes = plt.subplots(
        len(categories), columns, figsize=(7.0, 7.0 / columns * len(categories) + 0.3), squeeze=False
    )
    for row, category in enumerate(categories):
        members = shown[shown["category"] == category]
        normal = members[members["label"] == 0]
        anomalous = members[members["label"] == 1]
        picks = [
            normal.sample(min(columns // 2, len(normal)), random_state=seed),
            anomalous.sample(min(columns - columns // 2, len(anomalous)), random_state=seed).sort_values("defect"),
        ]
        for ax, item in zip(axes[row], pd.concat(picks).itertuples(), strict=False):
            ax.imshow(_square(item.path, size))
            if item.mask_path:
                ax.contour(resize_mask(read_mask(item.mask_path), size), [0.5], colors=ANOMALOUS, linewidths=1)
            ax.set_title(item.defect.replace("_", " "), fontsize=6, pad=2)
        axes[row, 0].set_ylabel(category.replace("_", "\n"), fontsize=7)
    _image_axes(axes)
    if hidden:
        figure.suptitle("not shown (licence): " + ", ".join(hidden), fontsize=7)
    return figure


def heat_maps(index: pd.DataFrame, maps: np.ndarray, thresholds: Sequence[float], *, size: int = 224) -> Figure:
    """Draw image, ground truth and heat map of a few test images, one column each.

    The colour scale of a column runs from half to one and a half times its threshold, so that orange and brighter is
    over the threshold whatever the score scale of its group.

    Args:
        index: rows to draw, all of them publishable.
        maps: `(n, size, size)` float, one map per row.
        thresholds: n decision thresholds.
        size: side of the drawn images in pixels.
    """
    if not may_publish(index).all():
        raise ValueError("pixels of these images may not be published: choose rows with may_publish(index)")
    figure, axes = plt.subplots(3, len(index), figsize=(7.0, 7.0 / len(index) * 3 + 0.2), squeeze=False)
    for column, (item, values, limit) in enumerate(zip(index.itertuples(), maps, thresholds, strict=True)):
        image = _square(item.path, size)
        mask = resize_mask(read_mask(item.mask_path), size) if item.mask_path else np.zeros((size, size), bool)
        axes[0, column].imshow(image)
        axes[0, column].set_title(f"{item.category}\n{item.defect}".replace("_", " "), fontsize=7)
        axes[1, column].imshow(mask, cmap="gray", vmin=0, vmax=1)
        axes[2, column].imshow(image)
        axes[2, column].imshow(values, cmap="inferno", vmin=0.5 * limit, vmax=1.5 * limit, alpha=0.65)
    for ax, text in zip(axes[:, 0], ("image", "ground truth", "score"), strict=True):
        ax.set_ylabel(text, fontsize=8)
    _image_axes(axes)
    return figure


def score_distributions(rows: pd.DataFrame) -> Figure:
    """Draw the image scores of every category, normal against anomalous, with its own and the global threshold.

    Args:
        rows: image-level Records of one detector under the rules "class" and "global"; the former hold `normal_scores`
            and `anomalous_scores`.
    """
    own = rows[(rows["thresholds"] == "class") & (rows["category"] != "mean")].set_index("category")
    common = rows.loc[rows["thresholds"] == "global", "threshold"].iloc[0]
    values = np.concatenate([np.concatenate([row.normal_scores, row.anomalous_scores]) for row in own.itertuples()])
    edges = np.linspace(values.min(), np.quantile(values, 0.995), 60)
    figure, axes = plt.subplots(len(own), 1, figsize=(7.0, 0.75 * len(own) + 0.7), sharex=True, squeeze=False)
    for ax, row in zip(axes[:, 0], own.itertuples(), strict=True):
        for scores, colour, text in (
            (row.normal_scores, NORMAL, "normal"),
            (row.anomalous_scores, ANOMALOUS, "anomalous"),
        ):
            ax.hist(np.clip(scores, None, edges[-1]), edges, color=colour, alpha=0.6, label=text)
        ax.axvline(row.threshold, color="black", linewidth=1.4)
        ax.axvline(common, color="black", linewidth=1.2, linestyle="--")
        ax.set_ylabel(row.Index.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        ax.set_yticks([])
    axes[0, 0].legend(ncols=2, loc="upper right", fontsize=7)
    axes[-1, 0].set_xlabel("image score (L2); solid: the category's own optimal threshold, dashed: one for all")
    return figure


def pixel_distributions(rows: pd.DataFrame, thresholds: pd.DataFrame) -> Figure:
    """Draw the pixel scores of every category, normal against anomalous, each as a share of its own total.

    Args:
        rows: Records of `pixel_histograms`.
        thresholds: `own` and `global`, indexed by category.
    """
    figure, axes = plt.subplots(len(rows), 1, figsize=(7.0, 0.75 * len(rows) + 0.7), sharex=True, squeeze=False)
    for ax, row in zip(axes[:, 0], rows.itertuples(), strict=True):
        for counts, colour, text in ((row.normal, NORMAL, "normal"), (row.anomalous, ANOMALOUS, "anomalous")):
            ax.stairs(
                np.asarray(counts) / max(1, sum(counts)), row.edges, color=colour, alpha=0.6, fill=True, label=text
            )
        ax.axvline(thresholds.loc[row.category, "own"], color="black", linewidth=1.4)
        ax.axvline(thresholds.loc[row.category, "global"], color="black", linewidth=1.2, linestyle="--")
        ax.set_ylabel(row.category.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=8)
        ax.set_yticks([])
    axes[0, 0].legend(ncols=2, loc="upper right", fontsize=7)
    axes[-1, 0].set_xlabel("pixel score (L2); solid: the category's own optimal threshold, dashed: one for all")
    return figure


def known_unknown_bars(table: pd.DataFrame) -> Figure:
    """Draw F1 per category with and without class labels at evaluation, image level above pixel level.

    Args:
        table: `scenario_f1` of banks trained without labels; the bars are means over seeds.
    """
    levels, methods = ["image", "pixel"], [m for m in METHOD_COLOURS if m in set(table["method"])]
    categories = [c for c in dict.fromkeys(table["category"]) if c != "mean"] + ["mean"]
    figure, axes = plt.subplots(len(levels), 1, figsize=(7.0, 4.6), sharex=True)
    width = 0.8 / (2 * len(methods))
    for ax, level in zip(axes, levels, strict=True):
        means = table[table["level"] == level].groupby(["method", "category"])[["known", "unknown"]].mean()
        for i, method in enumerate(methods):
            for j, kind in enumerate(("known", "unknown")):
                values = means.loc[method][kind].reindex(categories)
                place = np.arange(len(categories)) + (2 * i + j - len(methods) + 0.5) * width
                look = (
                    {"facecolor": METHOD_COLOURS[method]}
                    if kind == "known"
                    else {"facecolor": "white", "hatch": "////"}
                )
                ax.bar(place, values, width, edgecolor=METHOD_COLOURS[method], label=f"{method}, {kind}", **look)
        ax.set_ylabel(f"{level} F1 (%)")
        ax.set_ylim(0, 105)
    axes[-1].set_xticks(range(len(categories)), [c.replace("_", "\n") for c in categories])
    axes[0].legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.28), fontsize=7.5)
    return figure


def first_component(encoder: object, image: np.ndarray) -> np.ndarray:
    """Project the patches of one image on their first principal component.

    Args:
        encoder: from `load_encoder`.
        image: `(H, W, 3)` uint8.

    Returns:
        `(h, w)` float, scaled to 0..1; the sign is chosen so that the centre of the image is bright.
    """
    maps, _ = encoder.forward(encoder.prepare([image]))
    patches = next(reversed(maps.values()))[0].float().cpu().numpy()  # (h, w, C)
    flat = patches.reshape(-1, patches.shape[-1])
    flat = flat - flat.mean(0)
    component = (flat @ np.linalg.svd(flat, full_matrices=False)[2][0]).reshape(patches.shape[:2])
    h, w = component.shape
    centre = component[h // 4 : -h // 4, w // 4 : -w // 4].mean()
    component = component if centre >= component.mean() else -component
    low, high = np.quantile(component, [0.01, 0.99])
    return np.clip((component - low) / (high - low), 0, 1)


def side_by_side(left: np.ndarray, right: np.ndarray, left_title: str, right_title: str) -> Figure:
    """Draw an image and a map of it at the same size."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.9))
    axes[0].imshow(left)
    axes[1].imshow(right, cmap="viridis", extent=(0, left.shape[1], left.shape[0], 0), interpolation="nearest")
    for ax, title in zip(axes, (left_title, right_title), strict=True):
        ax.set_title(title)
    _image_axes(axes)
    return figure


def token_projections(tokens: np.ndarray, classes: Sequence[str], keys: np.ndarray, *, seed: int) -> Figure:
    """Draw t-SNE and UMAP of image tokens, coloured by class, with the keys of the clusters as crosses.

    Args:
        tokens: `(N, D)` float.
        classes: N names; the colour of a point, unseen by the clustering.
        keys: `(K, D)` float, projected together with the tokens.
        seed: seeds both projections.
    """
    from sklearn.manifold import TSNE
    from umap import UMAP

    points = np.concatenate([tokens, keys])
    planes = {
        "t-SNE": TSNE(random_state=seed, perplexity=min(30, (len(points) - 1) / 3), init="pca").fit_transform(points),
        "UMAP": UMAP(random_state=seed, n_jobs=1).fit_transform(points),
    }
    names, classes = sorted(set(classes)), np.asarray(classes)
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.9))
    for ax, (title, plane) in zip(axes, planes.items(), strict=True):
        for name, colour in zip(names, colours, strict=False):
            mine = np.flatnonzero(classes == name)
            ax.scatter(*plane[mine].T, s=5, color=colour, label=name.replace("_", " "), linewidths=0)
        # thin crosses: a whole class can lie under one of them
        ax.scatter(*plane[len(tokens) :].T, s=110, marker="+", color="black", linewidths=1, label="centroid (key)")
        ax.set_title(f"{title}, {len(tokens)} images, {len(keys)} groups found")
    _image_axes(axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)
    return figure
