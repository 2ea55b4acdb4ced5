"""HierCore's options beside each other: clusterings, semantic layers, wrong labels, coreset ratios."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.experiments import fit_and_score, scenario_metrics
from hclib.book.figures import METHOD_COLOURS
from hclib.book.scenario_tables import STEADY

RULES = ["class/class", "group/class"]  # known and unknown evaluation of one set of scores
CLUSTERINGS = {
    "FINCH": {},
    "HDBSCAN": {"clustering": "hdbscan"},
    "DBSCAN": {"clustering": "dbscan"},
    "k-means": {"clustering": "kmeans"},
}
SCENARIOS = {
    "K→K": {"train_labels": "known", "test_labels": "known"},
    "K→U": {"train_labels": "known", "test_labels": "unknown"},
    "U→U": {"train_labels": "unknown", "test_labels": "unknown"},
}


def routed_scenario(config: dict) -> pd.DataFrame:
    """Return `scenario_metrics` with `misrouted`: test images in a bank that most belongs to another category.

    A bank belongs to the category that sends most of its test images there; the share is of the images of each
    category, in the rows "mean" of all images.
    """
    rows = scenario_metrics(config)
    scores, _, test = fit_and_score(config)
    category = test.index["category"].to_numpy()
    owner = pd.Series(category).groupby(scores.group).agg(lambda names: names.mode().iloc[0])
    wrong = pd.Series(owner.reindex(scores.group).to_numpy() != category)
    share = wrong.groupby(category).mean()
    return rows.assign(misrouted=rows["category"].map(share).where(rows["category"] != "mean", wrong.mean()))


def known_and_unknown(results: pd.DataFrame, by: list[str], level: str = "image") -> pd.DataFrame:
    """Return F1 (percent) with class and with group thresholds, their ratio, AUROC, groups and misrouted images.

    Args:
        results: Records of `routed_scenario` under `RULES`.
        by: columns that name a setting.
        level: "image" or "pixel".

    Returns:
        One row per setting and seed.
    """
    means = results[(results["category"] == "mean") & (results["level"] == level)]
    known, unknown = (means[means["thresholds"] == kind].set_index([*by, "seed"]) for kind in ("class", "group"))
    table = pd.DataFrame({"groups": known["banks"], "misrouted, %": 100 * known["misrouted"]})
    table["AUROC"] = known["auroc"]
    table["F1 known"], table["F1 unknown"] = 100 * known["f1"], 100 * unknown["f1"]
    table["ratio, %"] = 100 * table["F1 unknown"] / table["F1 known"]
    return table.reset_index()


def spread_table(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Return every column of `known_and_unknown` as mean ± standard deviation over seeds."""
    columns = [c for c in rows.columns if c not in (*by, "seed")]
    digits = {"AUROC": 3}
    return pd.DataFrame({c: report.spread(rows, by, c, digits=digits.get(c, 1)) for c in columns})


def flip_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return image F1 (percent) per share of wrong labels and scenario, one row per seed: K→K, K→U and U→U.

    Known training is evaluated as the scenario says: K→K with class thresholds and banks by label, K→U with group
    thresholds and banks by routing.
    """
    means = results[(results["category"] == "mean") & (results["level"] == "image")]
    kind = means["scenario"].map({"K→K": "class", "K→U": "group", "U→U": "group"})
    rows = means[means["thresholds"] == kind]
    return rows.assign(F1=100 * rows["f1"])[["scenario", "flip", "seed", "F1", "auroc", "misrouted"]]


def flip_curves(rows: pd.DataFrame) -> Figure:
    """Draw image F1 against the share of wrong training labels; U→U sees no labels and is a level line."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0), sharex=True)
    styles = {  # K→K wide and pale below K→U: the two often coincide
        "K→K": {"color": "#CC79A7", "marker": "o", "markersize": 9, "linewidth": 4, "alpha": 0.5},
        "K→U": {"color": "#000000", "marker": "s", "markersize": 4},
        "U→U": {"color": METHOD_COLOURS["HierCore"], "linestyle": "--"},
    }
    for ax, column, label in zip(axes, ("F1", "auroc"), ("image F1, %", "image AUROC"), strict=True):
        for scenario, style in styles.items():
            part = rows[rows["scenario"] == scenario].groupby("flip")[column].agg(["mean", "std"]).fillna(0)
            if scenario == "U→U":
                ax.axhline(part["mean"].iloc[0], label=scenario, **style)
            else:
                ax.errorbar(100 * part.index, part["mean"], part["std"], capsize=2, label=scenario, **style)
        ax.set_xlabel("wrong training labels, %")
        ax.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def clustering_verdicts(
    methods: pd.DataFrame, flips: pd.DataFrame, base: dict, page: str = "15_hiercore_clustering"
) -> list[Markdown]:
    """Test that the clusterings keep their F1 without labels, and how much wrong labels cost; record and return."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    where = f"{base['dataset']}, {base['encoder']} at {base['image_size']} px, {report.seeds(methods)}"
    ratio = methods.groupby("setting")["ratio, %"].mean()
    worst = flips["flip"].max()
    f1 = flips.groupby(["scenario", "flip"])["F1"].mean()
    lost = {name: f1[name][0] - f1[name][worst] for name in ("K→K", "K→U")}
    rivals = ", ".join(f"{name} {value:.1f} %" for name, value in ratio.items())
    return [
        report.claim(
            "every-clustering-is-steady",
            "HierCore keeps its image F1 without labels whichever clustering finds its groups.",
            bool((ratio[list(CLUSTERINGS)] >= 100 * STEADY).all()),
            f"F1 unknown / known: {rivals} ({where}).",
            source="HierCore, README (clustering_method)",
            **keys,
        ),
        report.claim(
            "wrong-labels-cost-more-than-none",
            f"With {worst:.0%} wrong training labels, known classes (K→K) do worse than no labels at all (U→U).",
            bool(f1["K→K"][worst] < f1["U→U"].iloc[0]),
            f"Image F1 K→K {f1['K→K'][0]:.1f} % without and {f1['K→K'][worst]:.1f} % with wrong labels (lost "
            f"{lost['K→K']:.1f} points; K→U {lost['K→U']:.1f}); U→U {f1['U→U'].iloc[0]:.1f} % ({where}).",
            source="this book's own",
            **keys,
        ),
    ]


def ratio_table(results: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return AUROC, AP, best F1, entries and seconds per coreset ratio and sampler, mean ± deviation over seeds."""
    rows = results[(results["category"] == "mean") & (results["level"] == level) & (results["thresholds"] == "class")]
    rows = rows.assign(percent=100 * rows["ratio"])
    columns = {"auroc": 3, "ap": 3, "f1_max": 3} | ({"aupro": 3} if level == "pixel" else {})
    columns |= {"bank_entries": 0, "fit_seconds": 1, "score_seconds": 1} if level == "image" else {}
    by = ["percent", "sampler"]
    return pd.DataFrame({c: report.spread(rows, by, c, digits=d) for c, d in columns.items()})


def ratio_curves(results: pd.DataFrame) -> Figure:
    """Draw image AUROC, pixel AP and scoring seconds against the coreset ratio, greedy beside random."""
    means = results[(results["category"] == "mean") & (results["thresholds"] == "class")]
    figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.7))
    panels = [("image", "auroc", "image AUROC"), ("pixel", "ap", "pixel AP"), ("image", "score_seconds", "scoring, s")]
    for ax, (level, column, label) in zip(axes, panels, strict=True):
        for sampler, colour, marker in (("greedy", METHOD_COLOURS["HierCore"], "o"), ("random", "#E69F00", "s")):
            rows = means[(means["level"] == level) & (means["sampler"] == sampler)]
            part = rows.groupby("ratio")[column].agg(["mean", "std"]).fillna(0)
            ax.errorbar(
                100 * part.index, part["mean"], part["std"], color=colour, marker=marker, capsize=2, label=sampler
            )
        ax.set_xscale("log")
        ax.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        ax.set_xlabel("coreset ratio, %")
        ax.set_ylabel(label)
    axes[0].legend()
    return figure


def ratio_verdicts(results: pd.DataFrame, base: dict, page: str = "16_hiercore_coreset_ratio") -> list[Markdown]:
    """Test that a tenth of the patches is enough, and that greedy beats random where little is kept; record both."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    means = results[(results["category"] == "mean") & (results["thresholds"] == "class")]
    value = means.groupby(["level", "sampler", "ratio"])[["auroc", "ap"]].mean()
    image, pixel = value.loc[("image", "greedy"), "auroc"], value.loc[("pixel", "greedy"), "ap"]
    full, least = image.index.max(), image.index.min()
    tenth = min(image.index, key=lambda ratio: abs(ratio - 0.1))
    random = value.loc[("image", "random"), "auroc"], value.loc[("pixel", "random"), "ap"]
    where = f"{base['dataset']}, {base['encoder']} at {base['image_size']} px, {report.seeds(means)}"
    loss = image[full] - image[tenth], pixel[full] - pixel[tenth]
    return [
        report.claim(
            "a-tenth-is-enough",
            f"A coreset of {tenth:.0%} of the patches loses at most 0.01 of image AUROC and pixel AP.",
            bool(max(loss) <= 0.01) if full > tenth else None,
            f"With {full:.0%} of the patches image AUROC {image[full]:.3f}, pixel AP {pixel[full]:.3f}; with "
            f"{tenth:.0%} {image[tenth]:.3f} and {pixel[tenth]:.3f} ({where}).",
            source="HierCore, 4.1 (ratio 0.1)",
            **keys,
        ),
        report.claim(
            "greedy-beats-random-when-little-is-kept",
            f"At a ratio of {least:.1%} a greedy coreset beats a random one in image AUROC and pixel AP.",
            bool(np.all([image[least] > random[0][least], pixel[least] > random[1][least]])),
            f"Image AUROC {image[least]:.3f} against {random[0][least]:.3f}, pixel AP {pixel[least]:.3f} against "
            f"{random[1][least]:.3f} ({where}).",
            source="PatchCore, 4.4 (coreset subsampling)",
            **keys,
        ),
    ]
