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
        "drawn_auroc": "training patches, drawn",
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


def _best(results: pd.DataFrame, values: pd.Series, digits: int = 1, scale: float = 100) -> tuple[pd.DataFrame, str]:
    """Return means over categories by noise and ratio, and in words where they are largest."""
    means = values.mul(scale).groupby([results["noise"], results["ratio"]]).mean().unstack("ratio")
    last = means.columns.max()
    words = ", ".join(
        f"{percent(row.idxmax())} at {percent(noise)} noise ({row.max():.{digits}f}, {row[last]:.{digits}f} for "
        f"{percent(last)})"
        for noise, row in means.iterrows()
    )
    return means, words


def separation_verdict(results: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether the best ratio for training patches lies inside the range that was tried (Figure 3).

    Decided with drawn memories, as in the paper; the limit is told beside it.
    """
    patches, words = _best(results, results["drawn_auroc"])
    _, limit = _best(results, results["patch_auroc"])
    _, images = _best(results, results["train_auroc"])
    _, gaps = _best(results, results["mean_anomalous"] - results["mean_normal"], 3, 1)
    ends = (patches.columns.min(), patches.columns.max())
    return report.claim(
        "separation-is-unimodal",
        "Training patches are separated best at a moderate sampling ratio, neither the smallest nor the largest tried.",
        bool(patches.idxmax(axis=1).between(*ends, inclusive="neither").all()),
        f"Best ratio by AUROC of patches, memories drawn: {words}; in the limit of infinitely many: {limit}; by AUROC "
        f"of images in the limit: {images}; by difference of mean scores: {gaps}.",
        source="MeDS, Figure 3",
        page=page,
        **config,
    )


def detector_verdict(results: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether small memories detect better than large ones on the test set (Figure 2, left)."""
    images, words = _best(results, results["test_auroc"])
    small = images.loc[:, images.columns <= 0.2].max(axis=1)
    return report.claim(
        "small-memories-detect-better",
        "As a detector of test images, an ensemble of small memories does better than one of large ones.",
        bool((small > images.loc[:, images.columns > 0.2].max(axis=1)).all()),
        f"Small: at most 20 % of the images. Best ratio by AUROC: {words}. Injected images stay in the test set, so a "
        "large memory holds them.",
        source="MeDS, Figure 2, left",
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
        f"patch; {results.groupby('category')['positive'].max().mean() * 100:.0f} % of pairs have a positive gap at "
        "the size that is best for it.",
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
