"""What SoftPatch's outlier factors remove: measures against the masks, and pictures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.figures import ANOMALOUS, _image_axes, _square
from hclib.book.noise_experiments import noisy_features, patch_truth
from hclib.data.datasets import may_publish
from hclib.evaluation.metrics import image_metrics
from hclib.images import read_mask, resize_mask
from hclib.kernels.features import Features
from hclib.methods import SoftPatch


def weigh(config: dict) -> tuple[Features, np.ndarray, float]:
    """Fit SoftPatch on a contaminated training set; return its features, factors (N, h, w) and the limit."""
    train, _, _ = noisy_features(config)
    detector = SoftPatch(seed=config["seed"], **config["options"]).fit(train)
    return train, detector.weights, detector.limit


def weight_run(config: dict) -> pd.DataFrame:
    """Return, per category, how well the factors of the training patches tell the injected defects from the rest.

    Args:
        config: as for `noisy_features`, with `seed` and the `options` of SoftPatch.

    Returns:
        One row per category and "all": `auroc` of the factors against the masks (at the patch grid), the shares of
        `defect_rejected` and `normal_rejected` patches, and of rejected patches that are defects, `precision`; the
        median factors `normal_median, defect_median`.
    """
    train, weights, limit = weigh(config)
    truth = patch_truth(train)
    rows = []
    groups = {**train.index.groupby("category").indices, "all": np.arange(len(train))}
    for category, members in groups.items():
        factor, defect = weights[members].ravel(), truth[members].ravel()
        rejected = factor > limit
        rows.append(
            {
                "category": category,
                "defect_patches": int(defect.sum()),
                "auroc": image_metrics(defect, factor)["auroc"] if defect.any() else float("nan"),
                "defect_rejected": rejected[defect].mean() if defect.any() else float("nan"),
                "normal_rejected": rejected[~defect].mean(),
                "precision": defect[rejected].mean() if rejected.any() else float("nan"),
                "normal_median": float(np.median(factor[~defect])),
                "defect_median": float(np.median(factor[defect])) if defect.any() else float("nan"),
            }
        )
    return pd.DataFrame(rows)


def weight_pictures(train: Features, weights: np.ndarray, limit: float, *, count: int = 5, size: int = 224) -> Figure:
    """Draw injected training images: image with mask, outlier factors, and the patches that were rejected.

    Args:
        train: the contaminated training features; images that may not be published are left out.
        weights: (N, h, w) factors.
        limit: patches above it were rejected.
        count: images, spread over the categories.
        size: side of the drawn images in pixels.

    Raises:
        ValueError: no injected image may be published.
    """
    shown = (train.index["label"] == 1).to_numpy() & may_publish(train.index)
    rows = np.flatnonzero(shown)
    if not len(rows):
        raise ValueError("none of the injected images may be published: choose another data set")
    defects = train.index.iloc[rows].groupby(["category", "defect"]).head(1).index.to_numpy()
    rows = defects[np.linspace(0, len(defects) - 1, min(count, len(defects))).round().astype(int)]
    figure, axes = plt.subplots(3, len(rows), figsize=(7.0, 7.0 / len(rows) * 3 + 0.3), squeeze=False)
    high = np.quantile(weights, 0.995)
    for column, row in enumerate(rows):
        item = train.index.iloc[row]
        image, extent = _square(item["path"], size), (0, size, size, 0)
        mask = resize_mask(read_mask(item["mask_path"]), size)
        for ax in axes[:, column]:
            ax.imshow(image)
            ax.contour(mask, [0.5], colors=ANOMALOUS, linewidths=1)
        drawn = axes[1, column].imshow(weights[row], cmap="viridis", extent=extent, vmin=1, vmax=high, alpha=0.85)
        removed = np.ma.masked_less_equal(weights[row], limit)
        axes[2, column].imshow(removed * 0 + 1, cmap="Greys", vmin=0, vmax=1, extent=extent, alpha=0.8)
        axes[0, column].set_title(f"{item['category']}\n{item['defect']}".replace("_", " "), fontsize=7)
    for ax, name in zip(axes[:, 0], ("injected image", "outlier factor", "rejected"), strict=True):
        ax.set_ylabel(name, fontsize=8)
    _image_axes(axes)
    figure.colorbar(drawn, ax=axes[1, :], shrink=0.8, label="factor")
    return figure


def weight_verdict(results: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test whether the factors reject injected defects rather than normal patches, and record it."""
    rows = results[results["category"] != "all"].groupby("category")[["defect_rejected", "normal_rejected"]].mean()
    whole = results[results["category"] == "all"][["defect_rejected", "normal_rejected"]].mean()
    better = rows["defect_rejected"] > 2 * rows["normal_rejected"]
    return report.claim(
        "lof-rejects-defects",
        "In every category SoftPatch rejects a patch of an injected defect at least twice as often as a normal patch.",
        bool(better.all()),
        f"Rejected: {whole['defect_rejected']:.0%} of the defect patches and {whole['normal_rejected']:.0%} of the "
        f"normal ones; it holds in {int(better.sum())} of {len(better)} categories"
        + (f", not in {', '.join(better.index[~better])}" if not better.all() else "")
        + f" ({base['dataset']}, {base['encoder']} at {base['image_size']} px).",
        source="SoftPatch, its idea; FUN-AD, supplementary Tables 7 to 10 for its use",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )
