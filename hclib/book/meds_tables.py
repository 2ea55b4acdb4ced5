"""Tables and verdicts of the MeDS chapter."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.evaluation.published import load_published


def percent(ratio: float) -> str:
    """Return a ratio as text in percent."""
    return f"{ratio * 100:g} %"


def separation_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return AUROC in percent, means over categories: a row per noise ratio and level, a column per sampling ratio.

    Args:
        results: Records of `low_pass`.
    """
    levels = {
        "patch_auroc": "training patches",
        "train_auroc": "training images",
        "test_auroc": "test images",
    }
    means = results.groupby(["noise", "ratio"])[list(levels)].mean().mul(100)
    table = means.rename(columns=levels).stack().unstack("ratio")
    table.index = [f"{level}, {percent(noise)} noise" for noise, level in table.index]
    return table.rename(columns=percent).rename_axis(index="AUROC in %", columns="images in a memory").round(1)


def beside_memory_row(results: pd.DataFrame, ratio: float) -> pd.DataFrame:
    """Return image AUROC of the memory ensemble beside the paper's (Table 4, second row), in percent.

    Args:
        results: Records of `low_pass`.
        ratio: sampling ratio, the paper's 0.1.
    """
    mine = results[(results["ratio"] - ratio).abs() < 1e-9]
    ours = mine.groupby("noise")["test_auroc"].mean().mul(100)
    paper = load_published("meds", "4").query(
        "param_value == 'Memory ensemble' and level == 'image' and metric == 'auroc'"
    )
    paper = paper.assign(noise=paper["noise_ratio"] / 100).set_index("noise")["value"]
    table = pd.DataFrame({"ours": ours, "paper": paper.reindex(ours.index)})
    table["difference"] = table["ours"] - table["paper"]
    return table.rename(index=percent).rename_axis("noise (anomalies / normals)").round(1)


def peak_verdict(results: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether small memories separate the training set best (Figure 3), for patches and for images."""
    parts, holds = [], []
    for column, name in (("patch_auroc", "patches"), ("train_auroc", "images")):
        means = results.groupby(["noise", "ratio"])[column].mean().unstack("ratio").mul(100)
        best, whole = means.idxmax(axis=1), means[means.columns.max()]
        holds += [bool((best < means.columns.max()).all() and (means.max(axis=1) > whole + 0.05).all())]
        parts.append(
            f"{name}: best at "
            + ", ".join(
                f"{percent(best[n])} of the images ({means.loc[n].max():.1f} against {whole[n]:.1f} for "
                f"{percent(means.columns.max())}) at {percent(n)} noise"
                for n in means.index
            )
        )
    return report.claim(
        "sparse-memories-separate",
        "On the contaminated training set, memories of a small share of the images separate normal from anomalous "
        "better than large ones.",
        all(holds),
        "AUROC in percent, mean over categories; " + "; ".join(parts) + ".",
        source="MeDS, Figure 3",
        page=page,
        **config,
    )


def moderate_verdict(results: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether the best ratio lies inside the range that was tried, as Theorem 1's unimodal weight suggests."""
    means = results.groupby(["noise", "ratio"])["patch_auroc"].mean().unstack("ratio").mul(100)
    best, ends = means.idxmax(axis=1), (means.columns.min(), means.columns.max())
    smallest = means[ends[0]]
    return report.claim(
        "separation-is-unimodal",
        "The separation is largest at a moderate sampling ratio: neither the smallest nor the largest that was tried.",
        bool(best.between(*ends, inclusive="neither").all()),
        "Best ratio for patches: "
        + ", ".join(
            f"{percent(best[n])} at {percent(n)} noise "
            f"(AUROC {means.loc[n].max():.1f}, smallest memory {smallest[n]:.1f})"
            for n in means.index
        )
        + ".",
        source="MeDS, Theorem 1 and Figure 3",
        page=page,
        **config,
    )


def gap_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return Theorem 1 on real patches, a row per category: where the gap peaks and how often the theorem applies.

    Args:
        results: Records of `expected_gap`.
    """
    rows = []
    for name, part in results.groupby("category"):
        peak, whole = part.loc[part["gap"].idxmax()], part.loc[part["size"].idxmax()]
        rows.append(
            {
                "category": name,
                "gap > 0 at every size": bool((part["gap"] > 0).all()),
                "largest gap at (patches)": int(peak["size"]),
                "of all patches": percent(float(f"{peak['share']:.2g}")),
                "largest gap": peak["gap"],
                "gap of the full memory": whole["gap"],
                "first order, at the peak": peak["first_order"],
                "pairs that meet the condition": percent(round(peak["dominated"], 3)),
            }
        )
    return pd.DataFrame(rows).set_index("category").round(3)


def gap_verdict(results: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether the mean gap is positive everywhere and peaks inside, and how far the condition carries."""
    table = gap_table(results)
    inner = results.groupby("category")["size"].agg(["min", "max"])
    peaks = table["largest gap at (patches)"]
    return report.claim(
        "expected-gap",
        "Anomalous patches are on average farther from a random memory than normal ones, by most at a medium size.",
        bool(table["gap > 0 at every size"].all() and (peaks.gt(inner["min"]) & peaks.lt(inner["max"])).all()),
        "Gap positive at every size in "
        f"{int(table['gap > 0 at every size'].sum())} of {len(table)} categories; peak between {int(peaks.min())} and "
        f"{int(peaks.max())} patches. The theorem's condition holds for "
        f"{results.groupby('category')['dominated'].first().mean() * 100:.0f} % of pairs of a normal and an anomalous "
        "patch, so for single pairs it says little; the mean gap is what is tested here.",
        source="MeDS, Theorem 1",
        page=page,
        **config,
    )


def agreement_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return how far B memories are from the limit: errors in percent of the mean score, AUROC and its spread.

    Args:
        results: Records of `limit_agreement`.
    """
    rows = results.assign(draws=results["replacement"].map({True: "with", False: "without"}))
    grouped = rows.groupby(["draws", "memories"])
    table = pd.DataFrame(
        {
            "mean error in %": grouped["mean_error"].mean() * 100,
            "largest error in %": grouped["largest_error"].max() * 100,
            "image AUROC in %": grouped["auroc"].mean() * 100,
            "± over draws": rows.groupby(["draws", "memories", "category"])["auroc"].std().groupby(level=[0, 1]).mean()
            * 100,
            "AUROC of the limit": grouped["limit_auroc"].mean() * 100,
        }
    )
    return table.rename_axis(["replacement", "memories"]).round(2)
