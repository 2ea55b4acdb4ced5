"""Noise with and without overlap: tables, curves and verdicts in the shape of FUN-AD's Tables 7 to 10."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.figures import METHOD_COLOURS
from hclib.book.noise_tables import ORDER, named
from hclib.evaluation.published import load_published

SETTINGS = {False: "no overlap", True: "overlap"}
TABLES = {"MVTec AD": ("7", "8"), "VisA": ("9", "10")}  # no overlap, overlap


def epochs_for(steps: int, images: int, *, batch_size: int = 32) -> int:
    """Return how many epochs give FUN-AD at least `steps` steps on so many images; 0 steps give 0."""
    return math.ceil(steps / math.ceil(images / batch_size))


def with_clean(results: pd.DataFrame) -> pd.DataFrame:
    """Return results with the runs on clean sets a second time, as "overlap": without noise the settings are one."""
    clean = results[(results["noise.ratio"] == 0) & ~results["noise.overlap"].astype(bool)]
    return pd.concat([results, clean.assign(**{"noise.overlap": True})], ignore_index=True)


def _rows(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that count: one per method, setting, ratio, category, level and seed."""
    rows = named(results).query("category != 'mean' and test_set == 'own'")
    return rows.assign(setting=rows["noise.overlap"].map(SETTINGS))


def measurable(results: pd.DataFrame) -> list[str]:
    """Return the categories whose AUROC is defined at every ratio, setting and level."""
    defined = _rows(results).groupby("category")["auroc"].apply(lambda values: values.notna().all())
    return defined.index[defined].tolist()


def counts(results: pd.DataFrame) -> pd.DataFrame:
    """Return, per category and nominal ratio, the realised ratio in percent and the anomalous test images left."""
    rows = _rows(results).query("level == 'image' and method == 'PatchCore'")
    first = rows.groupby(["category", "noise", "setting"])[["realised_per_normal", "n_anomalous"]].first()
    wide = first.unstack("setting")
    table = pd.DataFrame(
        {
            "realised in %": (wide["realised_per_normal"]["overlap"] * 100).round(1),
            "left to test, no overlap": wide["n_anomalous"]["no overlap"].fillna(0).astype(int),
            "left to test, overlap": wide["n_anomalous"]["overlap"].astype(int),
        }
    )
    return table.rename_axis(index=["category", "nominal in %"])


def overlap_table(results: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return AUROC in percent, mean over the measurable categories: a row per method, setting and ratio as columns."""
    rows = _rows(results)
    rows = rows[(rows["level"] == level) & rows["category"].isin(measurable(results))]
    means = rows.groupby(["method", "setting", "noise", "seed"], as_index=False)["auroc"].mean()
    text = report.spread(means, ["method", "setting", "noise"], "auroc", scale=100, digits=1)
    wide = text.unstack(["setting", "noise"])
    return wide.reindex([m for m in ORDER if m in wide.index]).rename_axis(columns=["", "noise in %"])


def overlap_step(results: pd.DataFrame) -> pd.DataFrame:
    """Return the change from no overlap to overlap at the ratio nearest to 10 %, in points, beside the paper's."""
    rows = _rows(results)
    rows = rows[rows["category"].isin(measurable(results)) & (rows["noise"] > 0)]
    near = min(rows["noise"].unique(), key=lambda ratio: abs(ratio - 10))
    means = rows[rows["noise"] == near].groupby(["level", "method", "setting"])["auroc"].mean().unstack("setting") * 100
    table = pd.DataFrame({"ours": means["overlap"] - means["no overlap"]})
    for dataset, numbers in TABLES.items():
        without, kept = (_average(number) for number in numbers)
        table[f"paper, {dataset}"] = (kept - without).reindex(table.index)
    table["difference to MVTec AD"] = table["ours"] - table["paper, MVTec AD"]
    order = [k for k in pd.MultiIndex.from_product([["image", "pixel"], ORDER]) if k in table.index]
    return table.reindex(order).round(1)


def _average(number: str) -> pd.Series:
    paper = load_published("funad", number)
    mean = paper[paper["class"] == "mean"].set_index(["level", "method"])["value"]
    best = mean.xs("FUN-AD", level="method", drop_level=False).rename({"FUN-AD": "FUN-AD, best epoch"}, level="method")
    return pd.concat([mean, best])


def overlap_curves(results: pd.DataFrame) -> Figure:
    """Draw image AUROC over the ratio for every method, without overlap solid and with overlap dashed."""
    rows = _rows(results)
    rows = rows[(rows["level"] == "image") & rows["category"].isin(measurable(results)) & (rows["epoch"] == "last")]
    methods = [m for m in ORDER if m in set(rows["method"])]
    figure, axes = plt.subplots(1, len(methods), figsize=(7.0, 2.5), sharey=True, squeeze=False)
    for ax, method in zip(axes[0], methods, strict=True):
        for setting, style in (("no overlap", "-"), ("overlap", "--")):
            mine = (
                rows[(rows["method"] == method) & (rows["setting"] == setting)].groupby("noise")["auroc"].mean() * 100
            )
            ax.plot(mine.index, mine, style, marker="o", ms=3, color=METHOD_COLOURS[method], label=setting)
        ax.set_title(method)
    axes[0, 0].set_ylabel("image AUROC in %")
    figure.supxlabel("injected anomalies per normal image in %", fontsize=9)
    handles = [
        plt.Line2D([], [], color="grey", ls=style, label=name)
        for name, style in (("no overlap", "-"), ("overlap", "--"))
    ]
    axes[0, 0].legend(handles=handles, fontsize=7)
    return figure


def overlap_verdicts(results: pd.DataFrame, step: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test that overlap costs a plain bank more than noise does, and spares methods made for noise; record both."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    where = f"{base['dataset']} ({', '.join(measurable(results))}), {base['encoder']} at {base['image_size']} px"
    ours, paper = step["ours"]["image"], step["paper, MVTec AD"]["image"]
    robust = [m for m in ("SoftPatch", "InReaCh", "FUN-AD") if m in ours.index]
    rows = _rows(results)
    rows = rows[
        (rows["level"] == "image") & rows["category"].isin(measurable(results)) & (rows["method"] == "PatchCore")
    ]
    means = rows.groupby(["setting", "noise"])["auroc"].mean().unstack("setting") * 100
    noise_cost = means["no overlap"].iloc[-1] - means["no overlap"].iloc[0]
    overlap_cost = means["overlap"].iloc[-1] - means["no overlap"].iloc[-1]
    return [
        report.claim(
            "overlap-costs-banks",
            "Leaving injected images in the test set costs PatchCore more image AUROC than the noise itself.",
            bool(overlap_cost < min(noise_cost, 0) - 0.05),
            f"At the highest ratio: noise {noise_cost:+.1f}, overlap {overlap_cost:+.1f} points more ({where}).",
            source="FUN-AD, supplementary Tables 7 to 10",
            **keys,
        ),
        report.claim(
            "overlap-spares-robust",
            "Overlap costs methods made for noise less image AUROC than PatchCore.",
            bool((ours[robust] > ours["PatchCore"]).all()),
            ", ".join(f"{m} {ours[m]:+.1f} (paper {paper[m]:+.1f})" for m in ["PatchCore", *robust])
            + f" points from no overlap to overlap; {where}; the paper on MVTec AD.",
            source="FUN-AD, supplementary Tables 7 to 10",
            **keys,
        ),
    ]
