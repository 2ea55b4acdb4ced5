"""One-class against multi-class training: eight metrics and mAD, as in HierCore's Tables 3 and A.7 to A.10."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.evaluation.metrics import mad
from hclib.evaluation.published import load_published

IMAGE = ["auroc", "ap", "f1_max"]
PIXEL = ["auroc", "ap", "f1_max", "aupro", "iou_max"]
TABLES = {"MVTec AD": "A.7", "VisA": "A.8", "MPDD": "A.9", "BTAD": "A.10"}
SETTINGS = ["PatchCore, one-class", "PatchCore, multi-class", "HierCore, multi-class"]
CLOSE = 0.01  # a difference in mAD up to here counts as "no loss"; the paper's largest for these methods is 0.006


def metric_means(results: pd.DataFrame) -> pd.DataFrame:
    """Return the class means of all metrics and both mAD, one row per setting and seed.

    Args:
        results: Records with `setting, seed, level, category` and the metrics, rows under class thresholds.
    """
    rows = []
    for (setting, seed), part in results[results["category"] == "mean"].groupby(["setting", "seed"], sort=False):
        level = part.set_index("level")
        row = {("image", m): level.loc["image", m] for m in IMAGE} | {
            ("pixel", m): level.loc["pixel", m] for m in PIXEL
        }
        row["image", "mAD"] = mad({m: row["image", m] for m in IMAGE}, "I")
        row["pixel", "mAD"] = sum(row["pixel", m] for m in PIXEL) / len(PIXEL)
        rows.append({"setting": setting, "seed": seed} | row)
    table = pd.DataFrame(rows).set_index(["setting", "seed"])
    return table.set_axis(pd.MultiIndex.from_tuples(table.columns), axis=1)


def metric_table(means: pd.DataFrame) -> pd.DataFrame:
    """Return one row per setting, mean ± standard deviation over seeds, metrics as columns of the two levels."""
    grouped = means.groupby(level="setting", sort=False)
    mean, deviation, count = grouped.mean(), grouped.std(ddof=1), grouped.size()
    text = mean.map("{:.3f}".format)
    if (count > 1).all():
        text = text + deviation.map(" ± {:.3f}".format)
    return text.rename_axis("").loc[[s for s in SETTINGS if s in text.index]]


def mad_beside_paper(means: pd.DataFrame) -> pd.DataFrame:
    """Return our mAD beside the paper's for each of its data sets, and the loss against one-class PatchCore in both."""
    paper = load_published("hiercore", "3").drop(columns="paper")
    paper = paper[(paper["metric"] == "mad") & paper["method"].isin(["PatchCore", "HierCore"])]
    ours = means.groupby(level="setting").mean()
    rows = []
    for setting in SETTINGS:
        method, _, train = setting.partition(", ")
        for level in ("image", "pixel"):
            mine = paper.query("method == @method and train_setting == @train and level == @level")
            row = {"setting": setting, "level": level, "ours": ours.loc[setting, (level, "mAD")]}
            row |= {f"paper, {d}": float(v) for d, v in zip(mine["dataset"], mine["value"], strict=True)}
            rows.append(row)
    return pd.DataFrame(rows).set_index(["level", "setting"]).sort_index(level="level", sort_remaining=False).round(3)


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """Return the change in mAD against one-class PatchCore for every column of `mad_beside_paper`."""
    base = table.xs(SETTINGS[0], level="setting")
    return (
        (table - base.reindex(table.index.get_level_values("level")).to_numpy())
        .drop(SETTINGS[0], level="setting")
        .round(3)
    )


def performance_verdicts(loss: pd.DataFrame, base: dict, page: str = "11_hiercore_one_vs_multi") -> list[Markdown]:
    """Test that neither PatchCore nor HierCore loses from one-class to multi-class training; record both."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    statements = {
        "patchcore-multi-class": (
            "PatchCore keeps its one-class performance with one bank for all classes.",
            SETTINGS[1],
        ),
        "hiercore-multi-class": (
            "HierCore, trained without labels, keeps one-class PatchCore's performance.",
            SETTINGS[2],
        ),
    }
    verdicts = []
    for name, (statement, setting) in statements.items():
        ours = loss.xs(setting, level="setting")["ours"]
        theirs = loss.xs(setting, level="setting").drop(columns="ours")
        evidence = "; ".join(
            f"{level} mAD {ours[level]:+.3f} (paper: {theirs.loc[level].min():+.3f} to {theirs.loc[level].max():+.3f})"
            for level in ("image", "pixel")
        )
        where = f"{base['dataset']}, {base['encoder']} at {base['image_size']} px"
        verdicts.append(
            report.claim(
                name,
                statement,
                bool((ours >= -CLOSE).all()),
                f"{evidence} ({where}).",
                source="HierCore, 4.3 and Table 3",
                **keys,
            )
        )
    return verdicts


def category_beside_paper(results: pd.DataFrame, category: str) -> pd.DataFrame:
    """Return a category that the paper has too, trained alone, beside the paper's numbers for it.

    Args:
        results: Records of `label_scenario` with `method, encoder, image_size`, rows under class thresholds.
        category: name in our data and in the paper's MVTec AD tables.

    Returns:
        One row per method and source: image AUROC, AP, F1-max and pixel F1-max. The paper prints F1 per class (Table
        B.11) but AUROC and AP only as means of its 15 classes (Table A.7). `difference` rows compare F1.
    """
    rows = results[(results["category"] == category) & (results["aggregate"] == "class")]
    means = (
        rows.groupby(["method", "encoder", "image_size", "level"])[["auroc", "ap", "f1_max"]].mean().unstack("level")
    )
    f1, mean = load_published("hiercore", "B.11"), load_published("hiercore", "A.7")
    f1 = f1[(f1["class"] == category) & (f1["eval_setting"] == "known") & (f1["metric"] == "f1")]
    mean = mean[(mean["train_setting"] == "multi-class") & (mean["level"] == "image")]
    table = {}
    for method in ("PatchCore", "HierCore"):
        printed = f1[f1["method"] == method].set_index("level")["value"].astype(float) / 100
        average = mean[mean["method"] == method].set_index("metric")["value"].astype(float)
        for (encoder, size), row in means.loc[method].iterrows():
            ours = [row["auroc", "image"], row["ap", "image"], row["f1_max", "image"], row["f1_max", "pixel"]]
            table[method, f"ours: {encoder}, {size} px"] = ours
            differences = [None, None, ours[2] - printed["image"], ours[3] - printed["pixel"]]
            table[method, f"difference: {encoder}, {size} px"] = differences
        table[method, f"paper: {category}"] = [None, None, printed["image"], printed["pixel"]]
        table[method, "paper: mean of 15 classes"] = [average["auroc"], average["ap"], average["f1_max"], None]
    columns = ["image AUROC", "image AP", "image F1-max", "pixel F1-max"]
    frame = pd.DataFrame(table, index=columns).T.astype(float).rename_axis(["method", ""])
    return frame.round(3).astype(object).where(frame.notna(), "")
