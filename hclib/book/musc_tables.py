"""Tables and verdicts of MuSc's pages on zero-shot scoring and its parts (20, 21)."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.evaluation.published import load_published

NAMES = {"auroc": "AUROC", "f1_max": "F1-max", "ap": "AP", "aupro": "AUPRO"}
COLUMNS = [("image", "auroc"), ("image", "f1_max"), ("image", "ap")]
COLUMNS += [("pixel", "auroc"), ("pixel", "f1_max"), ("pixel", "ap"), ("pixel", "aupro")]
CLOSE = 0.05  # a difference in AUROC up to here counts as "comparable" across encoders and data


def keys_of(base: dict, page: str) -> dict:
    """Return what identifies a claim: profile, data set, encoder, resolution and the page that tests it."""
    return {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}


def wide(rows: pd.DataFrame, by: str = "category") -> pd.DataFrame:
    """Return the seven metrics of Tables 17 and 18 in percent, one row per `by`, from rows of `measured`."""
    table = {
        (level, NAMES[metric]): rows[rows["level"] == level].groupby(by, sort=False)[metric].mean() * 100
        for level, metric in COLUMNS
    }
    return pd.DataFrame(table)


def zero_shot_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return our Table 17: a row per category and their mean, percent."""
    table = wide(results)
    table.loc["mean"] = table.mean()
    return table.round(1)


def published_rows(table: int, dataset: str, **chosen: str) -> pd.DataFrame:
    """Return MuSc's own seven metrics of a published table, one row per class, percent."""
    paper = load_published("musc", table)
    paper = paper[(paper["dataset"] == dataset) & (paper["method"] == "MuSc") & (paper["train_setting"] == "zero-shot")]
    for column, value in chosen.items():
        paper = paper[paper[column] == value]
    paper = paper[paper["metric"].isin(NAMES)]
    return pd.DataFrame(
        {
            (level, NAMES[metric]): part.drop_duplicates("class").set_index("class")["value"]
            for level, metric in COLUMNS
            if len(part := paper[(paper["level"] == level) & (paper["metric"] == metric)])
        }
    )


def stacked(ours: pd.Series, paper: pd.Series) -> pd.DataFrame:
    """Return three rows: ours, the paper's, the difference, for the metrics that both have."""
    paper = paper.reindex(ours.index)
    return pd.DataFrame([ours, paper, ours - paper], index=["ours", "paper", "difference"]).round(1)


def means_beside_paper(results: pd.DataFrame) -> pd.DataFrame:
    """Return the mean over our categories beside MuSc's means on MVTec AD and VisA (Table 1) and BTAD (Table 14)."""
    ours = wide(results).mean()
    sources = {"MVTec AD": (17, {"class": "mean"}), "VisA": (18, {"class": "mean"}), "BTAD": (14, {})}
    parts = {}
    for name, (table, chosen) in sources.items():
        parts[name] = stacked(ours, published_rows(table, name, **chosen).iloc[0])
    return pd.concat(parts, names=["the paper on", ""])


def classes_beside_paper(results: pd.DataFrame, dataset: str = "MVTec AD", table: int = 17) -> pd.DataFrame:
    """Return our categories that Table 17 has too: ours, paper, difference, for every resolution measured."""
    paper, parts = published_rows(table, dataset), {}
    for (category, size), rows in results.groupby(["category", "image_size"], sort=False):
        if category in paper.index:
            parts[category, f"{size} px, {_images(rows)} images"] = stacked(wide(rows).iloc[0], paper.loc[category])
    return pd.concat(parts, names=["class", "ours at", ""]) if parts else pd.DataFrame()


def _images(rows: pd.DataFrame) -> int:
    return int(rows.loc[rows["level"] == "image", ["n_normal", "n_anomalous"]].iloc[0].sum())


def many_shot_gap(results: pd.DataFrame, many_shot: pd.DataFrame) -> pd.DataFrame:
    """Return zero-shot MuSc against full-shot PatchCore on the same categories, beside the paper's gap (Table 2).

    Args:
        results: Records of `zero_shot`.
        many_shot: Records of `one_class`: a PatchCore per category, trained on all of its normal images.

    Returns:
        AUROC in percent, means over the categories that both have.
    """
    paper = load_published("musc", 2).query("method in ('MuSc', 'PatchCore')")
    table = {}
    for level in ("image", "pixel"):
        zero = results[results["level"] == level].set_index("category")["auroc"]
        full = many_shot[many_shot["level"] == level].groupby("category")["auroc"].mean().reindex(zero.index)
        theirs = paper[paper["level"] == level].set_index("method")["value"]
        table[level, "ours"] = [zero.mean() * 100, full.mean() * 100]
        table[level, "paper, MVTec AD"] = [theirs["MuSc"], theirs["PatchCore"]]
    frame = pd.DataFrame(table, index=["MuSc, zero-shot", "PatchCore, full-shot"])
    frame.loc["difference"] = frame.iloc[0] - frame.iloc[1]
    return frame.round(1)


def diagnosis(results: pd.DataFrame) -> pd.DataFrame:
    """Return, per category, what stands behind the image AUROC: re-scoring, hits, and the pixel level."""
    image = results[results["level"] == "image"].set_index("category")
    before = results[results["level"] == "image without RsCIN"].set_index("category")["auroc"]
    pixel = results[results["level"] == "pixel"].set_index("category")
    table = {
        "image AUROC": image["auroc"] * 100,
        "without RsCIN": before * 100,
        "pixel AUROC": pixel["auroc"] * 100,
        "hits": image["hits"] * 100,
        "anomalous images": 100 * image["n_anomalous"] / (image["n_anomalous"] + image["n_normal"]),
        "anomalous pixels": 100 * pixel["n_anomalous"] / (pixel["n_anomalous"] + pixel["n_normal"]),
    }
    return pd.DataFrame(table).sort_values("image AUROC").round(1)


def mixed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how a mixed pile was scored: means over categories, the AUROC of all images on one scale, groups."""
    means = rows[rows["category"] != "pooled"].groupby(["way", "level"], sort=False)["auroc"].mean().unstack() * 100
    pooled = rows[rows["category"] == "pooled"].set_index("way")
    table = means[["image", "pixel"]].rename(columns="{} AUROC".format)
    table["one scale"] = pooled["auroc"] * 100
    return table.round(1).assign(groups=pooled["groups"])


def layer_table(runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return image and pixel AUROC (percent) per category for several choices of layers: name -> Records."""
    table = {(name, level): wide(rows)[level, "AUROC"] for name, rows in runs.items() for level in ("image", "pixel")}
    frame = pd.DataFrame(table)
    frame.loc["mean"] = frame.mean()
    return frame.round(1)


def weakness(results: pd.DataFrame) -> Markdown:
    """Say in one paragraph what goes wrong in the weakest category, from the numbers of `diagnosis`."""
    table = diagnosis(results)
    row, name = table.iloc[0], str(table.index[0]).replace("_", " ")
    if row["image AUROC"] >= 95:
        return Markdown(
            f"**No category fails.** The weakest, {name}, has an image AUROC of {row['image AUROC']:.1f} %."
        )
    found, pixels = row["hits"], row["pixel AUROC"]
    image = results[(results["level"] == "image") & (results["category"] == table.index[0])].iloc[0]
    normal, anomalous = (pd.Series(image[f"{kind}_scores"]).median() for kind in ("normal", "anomalous"))
    where = (
        "so the defect usually is what looks rarest inside its image, and the maps point at it"
        if found >= 50
        else "so something other than the defect usually looks rarest in the image"
    )
    scale = (
        f"The typical normal image scores as high as the typical anomalous one ({normal:.3f} against {anomalous:.3f}): "
        "normal parts that vary from image to image are as rare in the pile as the defects."
        if normal >= 0.97 * anomalous
        else f"The typical normal image scores {normal:.3f}, the typical anomalous one {anomalous:.3f}; tails overlap."
    )
    return Markdown(
        f"**The weakest category is {name}**, with an image AUROC of {row['image AUROC']:.1f} %; its pixels reach "
        f"{pixels:.1f} %. In {found:.0f} % of its anomalous images the highest patch lies in the defect, {where}. "
        f"{scale}"
    )


def zero_shot_verdicts(
    results: pd.DataFrame,
    everything: pd.DataFrame,
    full_shot: pd.DataFrame,
    base: dict,
    page: str = "20_musc_zero_shot",
) -> list[Markdown]:
    """Test MuSc's distance to full-shot PatchCore, and to its own Table 17 where we have the class; record both.

    Args:
        results: Records of `zero_shot`, all categories at the page's resolution.
        everything: these and those at other resolutions.
        full_shot: Records of `one_class`.
        base: `profile, dataset, encoder, image_size` of the run.
        page: the notebook that asks.
    """
    gap, keys = many_shot_gap(results, full_shot).loc["difference"], keys_of(base, page)
    verdicts = [
        report.claim(
            "musc-near-full-shot",
            "Without training images, MuSc comes within 5 points of image AUROC of PatchCore with all normal images.",
            bool(gap["image", "ours"] >= -100 * CLOSE),
            f"Mean difference over {results['category'].nunique()} categories: {gap['image', 'ours']:+.1f} points at "
            f"image and {gap['pixel', 'ours']:+.1f} at pixel level (paper, MVTec AD: "
            f"{gap['image', 'paper, MVTec AD']:+.1f} and {gap['pixel', 'paper, MVTec AD']:+.1f}).",
            source="MuSc, 4.1 and Table 2",
            **keys,
        )
    ]
    theirs = published_rows(17, "MVTec AD")
    mine = everything[(everything["category"] == "screw") & (base["dataset"] in ("realmix", "mvtec"))]
    if len(mine):
        ours = {size: wide(rows).iloc[0] for size, rows in mine.groupby("image_size")}
        count = {size: _images(rows) for size, rows in mine.groupby("image_size")}
        finest = ours[max(ours)]
        gaps = {level: finest[level, "AUROC"] - theirs.loc["screw"][level, "AUROC"] for level in ("image", "pixel")}
        numbers = "; ".join(
            f"{size} px ({count[size]} images): {row['image', 'AUROC']:.1f} and {row['pixel', 'AUROC']:.1f} %"
            for size, row in ours.items()
        )
        verdicts.append(
            report.claim(
                "musc-screw",
                "On MVTec AD's screw, MuSc comes within 5 points of Table 17's image and pixel AUROC.",
                bool(min(gaps.values()) >= -100 * CLOSE),
                f"Image and pixel AUROC at {numbers} (paper, CLIP ViT-L/14 at 518 px: "
                f"{theirs.loc['screw']['image', 'AUROC']:.1f} and {theirs.loc['screw']['pixel', 'AUROC']:.1f} %).",
                source="MuSc, Table 17",
                **keys,
            )
        )
    return verdicts


def mixed_verdict(rows: pd.DataFrame, base: dict, page: str = "20_musc_zero_shot") -> Markdown:
    """Test whether FINCH clusters help mutual scoring in a pile of several products; record it."""
    table = mixed_table(rows)
    image = table["image AUROC"]
    numbers = "; ".join(f"{way} {value:.1f}" for way, value in image.items())
    return report.claim(
        "musc-mixed-pile",
        "In a pile of several unknown products, MuSc scores better inside FINCH clusters than over the whole pile.",
        bool(image["FINCH clusters"] > image["one pile"]),
        f"Image AUROC in percent, mean over categories: {numbers} ({int(table.loc['FINCH clusters', 'groups'])} "
        f"clusters, {base['dataset']}, {base['encoder']} at {base['image_size']} px).",
        source="this book's own",
        **keys_of(base, page),
    )


def variant_table(rows: pd.DataFrame, table: int, default: str) -> pd.DataFrame:
    """Return the mean AUROC of every variant and its change against the default, beside the paper's changes.

    Args:
        rows: Records of `ablation` of one part.
        table: number of the paper's table with the same variants.
        default: the variant that is the method.

    Returns:
        Percent; under "image AUROC" and "pixel AUROC": `ours`, `change` (against the default), the paper's change on
        `MVTec AD` and `VisA`, and `difference` of our change to the mean of theirs.
    """
    paper, parts = load_published("musc", table), {}
    theirs = paper.assign(param_value=paper["param_value"].map(_plain_name))
    for level in ("image", "pixel"):
        ours = rows[rows["level"] == level].groupby("value", sort=False)["auroc"].mean() * 100
        part = pd.DataFrame({"ours": ours, "change": ours - ours[default]})
        names = ["MVTec AD", "VisA"]
        for name in names:
            mine = theirs[(theirs["dataset"] == name) & (theirs["level"] == level)].set_index("param_value")["value"]
            part[name] = (mine - mine[default]).reindex(part.index)
        parts[f"{level} AUROC"] = part.assign(difference=part["change"] - part[names].mean(axis=1))
    return pd.concat(parts, axis=1).loc[lambda frame: frame["image AUROC", "MVTec AD"].notna()].round(1)


def _plain_name(printed: str) -> str:
    """Write a setting of Table 4 as `musc_experiments.STRATEGIES` does; other names are left as they are."""
    from hclib.book.musc_experiments import STRATEGIES

    return next((name for name in STRATEGIES if printed.startswith(name[:3])), printed)


def numbered(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `ablation` with their value as a `number`: "30%" is 30."""
    return rows.assign(number=rows["value"].str.rstrip("%").astype(float))


def both_levels(rows: pd.DataFrame) -> pd.Series:
    """Return the mean of image and pixel AUROC (percent) per variant: the paper's "comprehensive" result."""
    means = rows[rows["level"].isin(["image", "pixel"])].groupby(["value", "level"], sort=False)["auroc"].mean()
    return means.unstack().mean(axis=1) * 100


def best_of(
    name: str,
    statement: str,
    values: pd.Series,
    default: str,
    rivals: list[str],
    *,
    what: str,
    source: str,
    **keys: str,
) -> Markdown:
    """Test that the default beats all rivals, record it, and return the sentence.

    Args:
        name: of the claim.
        statement: the claim.
        values: a score per variant, in percent.
        default: the method's own variant.
        rivals: what it must beat.
        what: what the values are, in words.
        source: place in the paper.
        keys: as `keys_of`.
    """
    best = values[rivals].idxmax()
    evidence = f"{what}: {default} {values[default]:.1f} %, best rival {best} {values[best]:.1f} %"
    others = ", ".join(f"{rival} {values[rival]:.1f}" for rival in rivals if rival != best)
    evidence += f" (others: {others})." if others else "."
    holds = bool(values[default] > values[best])
    return report.claim(name, statement, holds, evidence, source=f"MuSc, {source}", **keys)
