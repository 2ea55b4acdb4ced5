"""Tables and verdicts of noise sweeps: ours beside the papers', slopes, FUN-AD's training in numbers."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.data.contamination import contaminate
from hclib.evaluation.published import load_published
from hclib.images import read_masks

ORDER = ["PatchCore", "HierCore", "SoftPatch", "InReaCh", "FUN-AD", "FUN-AD, best epoch"]


def named(results: pd.DataFrame) -> pd.DataFrame:
    """Return sweep rows with the book's method names and ratios in percent; FUN-AD's epochs as two methods.

    Returns:
        The rows with `method` renamed and `noise` (percent) added.
    """
    names = results["method"].replace("FunAD", "FUN-AD")
    best = results["epoch"] == "test"
    names = names.where(~best, names + ", best epoch")
    return results.assign(method=names, noise=(results["noise.ratio"] * 100).round(1))


def sweep_table(results: pd.DataFrame, *, test_set: str = "own") -> pd.DataFrame:
    """Return the layout of FUN-AD's Table 1: a row per method and level, a column per ratio, AUROC in percent.

    Args:
        results: Records of `noise_run`.
        test_set: "own", the images that a run left in its test set, or "common", those that every run left.
    """
    rows = named(results).query("category == 'mean' and test_set == @test_set")
    text = report.spread(rows, ["level", "method", "noise"], "auroc", scale=100, digits=1).unstack("noise")
    text = text.reindex(pd.MultiIndex.from_product([["image", "pixel"], ORDER], names=["AUROC in %", "method"]))
    return text.dropna(how="all").rename_axis(columns="anomalies / normals in %")


def paper_table1() -> pd.DataFrame:
    """Return FUN-AD's Table 1 (AUROC in percent): `method, level, noise, paper`; FUN-AD* is not included."""
    paper = load_published("funad", "1")
    paper = paper[paper["method"] != "FUN-AD*"].rename(columns={"noise_ratio": "noise"})
    table = paper[["method", "level", "noise"]].assign(paper=paper["value"])
    chosen = table[table["method"] == "FUN-AD"].assign(method="FUN-AD, best epoch")  # the paper's choice of epoch
    return pd.concat([table, chosen], ignore_index=True)


def beside_table1(results: pd.DataFrame) -> pd.DataFrame:
    """Return ours (mean over seeds), the paper's and the difference for each ratio, in percent and points of AUROC."""
    rows = named(results).query("category == 'mean' and test_set == 'own'")
    ours = rows.groupby(["level", "method", "noise"], as_index=False)["auroc"].mean()
    table = ours.assign(ours=ours.pop("auroc") * 100).merge(paper_table1(), on=["level", "method", "noise"], how="left")
    table["difference"] = table["ours"] - table["paper"]
    long = table.melt(["level", "method", "noise"], ["ours", "paper", "difference"], "AUROC in %").dropna()
    wide = long.pivot(index=["level", "method", "AUROC in %"], columns="noise", values="value")
    order = pd.MultiIndex.from_product([["image", "pixel"], ORDER, ["ours", "paper", "difference"]])
    return wide.reindex([key for key in order if key in wide.index]).round(1).fillna("")


def slopes(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the highest ratio costs against no noise, in points of AUROC (negative: a loss).

    Returns:
        One row per level and method: `own test set`, `common test set` (mean ± spread over seeds), `paper`.
    """
    rows = named(results).query("category == 'mean'")
    wide = rows.pivot_table(index=["level", "method", "test_set", "seed"], columns="noise", values="auroc") * 100
    change = (wide.iloc[:, -1] - wide.iloc[:, 0]).rename("change").reset_index()
    text = report.spread(change, ["level", "method", "test_set"], "change", digits=1).unstack("test_set")
    text = text.rename(columns={"own": "own test set", "common": "common test set"})
    paper = paper_table1().pivot(index=["level", "method"], columns="noise", values="paper")
    ends = [n for n in (wide.columns[0], wide.columns[-1]) if n in paper]
    text["paper"] = (paper[ends[-1]] - paper[ends[0]]).round(1) if len(ends) == 2 else None
    return text.reindex([k for k in pd.MultiIndex.from_product([["image", "pixel"], ORDER]) if k in text.index])


def _change(results: pd.DataFrame, test_set: str) -> pd.DataFrame:
    rows = named(results).query("category == 'mean' and test_set == @test_set")
    means = rows.groupby(["level", "method", "noise"])["auroc"].mean().unstack("noise") * 100
    return means


def sweep_verdicts(results: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test three claims of FUN-AD's Table 1 on these results and record them."""
    own, common = _change(results, "own"), _change(results, "common")
    low, high = own.columns[0], own.columns[-1]
    seeds = results["seed"].nunique()
    where = (
        f"{base['dataset']}, {base['encoder']} at {base['image_size']} px, {seeds} seed{'s' * (seeds > 1)}, "
        f"{low:g} to {high:g} % anomalies per normal image"
    )
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    source = "FUN-AD, supplementary Table 1"
    verdicts = []

    best = own.loc["image"].drop("FUN-AD, best epoch")
    verdicts.append(
        report.claim(
            "funad-best",
            "With 3 % noise and more FUN-AD has the highest image AUROC of the methods.",
            bool((best.idxmax()[best.columns >= 3] == "FUN-AD").all()),
            "; ".join(_order(best[ratio]) for ratio in (low, high)) + f" ({where}).",
            source=source,
            **keys,
        )
    )
    gain = own.loc["image"][high] - own.loc["image"][low]
    fixed = common.loc["image"][high] - common.loc["image"][low]
    verdicts.append(
        report.claim(
            "noise-helps",
            "Methods made for noise score higher image AUROC with the most noise than with none.",
            bool((gain[["SoftPatch", "InReaCh", "FUN-AD"]] > 0).all()),
            "Change in points, own test set (the same test images for all ratios): "
            + ", ".join(f"{m} {gain[m]:+.1f} ({fixed[m]:+.1f})" for m in gain.index)
            + f"; {where}.",
            source=source,
            **keys,
        )
    )
    change = (common[high] - common[low]).unstack("level").drop("FUN-AD, best epoch")
    robust, loss = change.drop(["PatchCore", "HierCore"]), change.loc["PatchCore"]
    verdicts.append(
        report.claim(
            "bank-degrades",
            "On the same test images a plain memory bank loses more to contamination than methods made for noise.",
            bool((robust > loss).all().all()),
            "; ".join(
                f"{level}: " + ", ".join(f"{m} {change[level][m]:+.1f}" for m in ORDER if m in change.index)
                for level in ("image", "pixel")
            )
            + f" points; {where}.",
            source="FUN-AD, supplementary Tables 1, 8 and 10; MeDS, Tables 1 and 2",
            **keys,
        )
    )
    return verdicts


def _order(means: pd.Series) -> str:
    ranked = means.sort_values(ascending=False)
    return f"at {means.name:g} %: " + ", ".join(f"{method} {value:.1f}" for method, value in ranked.items())


def anomalous_share(index: pd.DataFrame, ratio: float, seed: int, size: int) -> float:
    """Return the share of training pixels that masks call anomalous, without overlap: what a guess would hit."""
    noisy = contaminate(index, ratio, seed=seed, overlap=False)[0]
    return float(read_masks(noisy[noisy["split"] == "train"], size).mean())


def label_verdict(history: pd.DataFrame, chance: dict[float, float], base: dict, page: str) -> Markdown:
    """Test whether FUN-AD's pseudo-anomalous patches are anomalous, in the last epoch, and record it.

    Args:
        history: `training_history`.
        chance: noise ratio in percent -> `anomalous_share`.
        base: `profile, dataset, encoder, image_size`.
        page: name of the notebook.
    """
    last = history[(history["epoch"] == history["epoch"].max()) & (history["noise"] > 0)]
    precision = last.groupby("noise")["precision"].mean()
    parts = [
        f"at {noise:g} % noise {value:.1%} of them are, of all training pixels {chance[noise]:.1%}"
        for noise, value in precision.items()
    ]
    return report.claim(
        "funad-labels",
        "Once there is noise, most patches that FUN-AD labels anomalous in training are anomalous.",
        bool((precision > 0.5).all()),
        f"In the last epoch {'; '.join(parts)} ({base['dataset']}, {base['encoder']} at {base['image_size']} px).",
        source="FUN-AD, supplement, section 1: its premise",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )


def training_history(results: pd.DataFrame) -> pd.DataFrame:
    """Return FUN-AD's histories as one frame: `noise, seed, epoch` and the quantities of `FunAD.history`."""
    if "history_loss" not in results:
        return pd.DataFrame()
    rows = named(results)
    rows = rows[rows["history_loss"].map(lambda v: isinstance(v, list))]
    columns = [c for c in rows.columns if c.startswith("history_")]
    frames = []
    for _, row in rows.iterrows():
        lists = {c.removeprefix("history_"): pd.array(row[c], dtype="Float64") for c in columns}
        frames.append(pd.DataFrame(lists).astype(float).assign(noise=row["noise"], seed=row["seed"]))
    history = pd.concat(frames)
    return history.rename_axis("epoch").reset_index()


def cost_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return mean seconds of fitting and scoring and the peak memory of each method (encoding not included)."""
    rows = named(results).query("category == 'mean' and level == 'image' and test_set == 'own' and epoch == 'last'")
    means = rows.groupby("method")[["fit_seconds", "score_seconds", "peak_mb"]].mean()
    return means.reindex([m for m in ORDER if m in means.index]).round({"peak_mb": 0}).round(1)
