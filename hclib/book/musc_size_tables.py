"""Tables and verdicts of MuSc's page on sizes and costs (23)."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.book.musc_tables import keys_of
from hclib.evaluation.published import load_published

LITTLE = 0.011  # the largest loss of Table 7


def size_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return Table 7: AUROC for s parts, ours (mean ± deviation over divisions), paper, and the changes."""
    mine = rows[(rows["kind"] == "subsets")]
    means = mine.groupby(["subsets", "division_seed", "level"])["auroc"].mean().mul(100).unstack()
    paper = load_published("musc", 7)
    table = {}
    for level in ("image", "pixel"):
        grouped = means[level].groupby(level="subsets")
        table[f"{level} AUROC", "ours"] = [
            f"{g.mean():.1f}" + (f" ± {g.std(ddof=1):.1f}" if len(g) > 1 else "") for _, g in grouped
        ]
        change = grouped.mean() - grouped.mean().loc[1]
        table[f"{level} AUROC", "change"] = change.round(1).to_list()
        changes = []
        for name in ("MVTec AD", "VisA"):
            theirs = paper[(paper["dataset"] == name) & (paper["level"] == level)].set_index("param_value")["value"]
            changes.append((theirs - theirs["1"]).reindex(change.index.astype(str)))
            table[f"{level} AUROC", name] = changes[-1].round(1).to_list()
        difference = change.to_numpy() - pd.concat(changes, axis=1).mean(axis=1).to_numpy()
        table[f"{level} AUROC", "difference"] = difference.round(1).tolist()
    frame = pd.DataFrame(table, index=sorted(mine["subsets"].unique())).rename_axis("s")
    sizes = mine.groupby("subsets")[["smallest_part", "largest_part"]].agg(
        {"smallest_part": "min", "largest_part": "max"}
    )
    frame.insert(0, ("images in a part", ""), [f"{a}-{b}" for a, b in sizes.itertuples(index=False)])
    return frame


def size_verdict(rows: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test Table 7's claim, that three subsets cost no more than the paper reports, at both levels."""
    mine = rows[rows["kind"] == "subsets"]
    means = mine.groupby(["level", "subsets"])["auroc"].mean().unstack()
    loss = means[1] - means[max(means)]
    sizes, paper = mine[mine["subsets"] == max(means)], load_published("musc", 7)
    printed = paper.query("metric == 'auroc'").pivot_table(
        index=["dataset", "level"], columns="param_value", values="value"
    )
    lost = (printed["1"] - printed["3"]).unstack()
    theirs = ", ".join(f"{row['image']:.1f} and {row['pixel']:.1f} on {name}" for name, row in lost.iterrows())
    return report.claim(
        "musc-small-subsets",
        "Dividing the images into subsets that are scored apart costs at most 1.1 points of AUROC at either level.",
        bool((loss <= LITTLE).all()),
        f"{max(means)} subsets of {sizes['smallest_part'].min()} to {sizes['largest_part'].max()} images lose "
        f"{100 * loss['image']:.1f} points of image and {100 * loss['pixel']:.1f} of pixel AUROC "
        f"({base['dataset']}, {mine['category'].nunique()} categories, {mine['division_seed'].nunique()} divisions; "
        f"paper: {theirs}).",
        source="MuSc, 4.2 and Table 7",
        **keys_of(base, page),
    )


def few_images(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the image rows of piles that stand alone, and of the whole category, with `pile`: images in a part."""
    alone = rows[(rows["kind"] == "alone") & (rows["level"] == "image")]
    whole = rows[(rows["kind"] == "subsets") & (rows["subsets"] == 1) & (rows["level"] == "image")]
    pile = alone["wanted"].astype(int).astype(str).str.zfill(2)
    whole = whole.assign(pile="all", wanted=whole["largest_part"])
    return pd.concat([alone.assign(pile=pile), whole], ignore_index=True)


def cost_beside_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the time of s subsets relative to one pile: ours, the paper's (Table 13), the difference, percent."""
    most = rows[(rows["images"] == rows["images"].max()) & (rows["way"] == "mutual_scores")].set_index("subsets")
    ours = 100 * most["cpu_seconds"] / most.loc[1, "cpu_seconds"]
    paper = load_published("musc", 13).query("metric == 'ms' and method == 'MuSc'")
    parts = paper["param_value"].str.split("|", expand=True)
    table = pd.DataFrame({"ours": ours})
    for backbone in dict.fromkeys(parts[0]):
        mine = pd.Series(paper["value"].to_numpy(), parts[1].astype(int))[(parts[0] == backbone).to_numpy()]
        table[f"paper, {backbone}"] = 100 * mine / mine.loc[1]
    table["difference"] = table["ours"] - table.drop(columns="ours").mean(axis=1)
    return table.round(0).rename_axis("s")


def cost_verdict(rows: pd.DataFrame, page: str, profile: str) -> Markdown:
    """Test this book's kernel against the plain way at the most images measured: time and memory; record it."""
    most = rows[(rows["images"] == rows["images"].max()) & (rows["subsets"] == 1)].set_index("way")
    ours, plain = most.loc["mutual_scores"], most.loc["each against all"]
    faster, smaller = plain["cpu_seconds"] / ours["cpu_seconds"], plain["extra_mb"] / max(1.0, ours["extra_mb"])
    return report.claim(
        "musc-pairs-once",
        "Multiplying each pair of images once is at least 1.5 times as fast as scoring each image against all others, "
        "with at most a quarter of the extra memory.",
        bool(faster >= 1.5 and smaller >= 4),
        f"{int(ours['images'])} images: {faster:.1f} times as fast, {ours['extra_mb']:.0f} instead of "
        f"{plain['extra_mb']:.0f} MB beside the patches.",
        source="this book's own",
        page=page,
        profile=profile,
        dataset="random vectors",
        encoder="none",
        image_size=224,
    )
