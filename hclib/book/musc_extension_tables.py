"""Tables and verdicts of MuSc's pages 22 and 24 to 27: re-scoring, references, encoders, orientation, shares."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.book.musc_extensions import TURNS
from hclib.book.musc_tables import keys_of
from hclib.evaluation.published import load_published

IMAGE = {"auroc": "AUROC", "f1_max": "F1-max", "ap": "AP"}
SAME = 0.005  # changes of AUROC up to half a point count as none
FEWEST = 4  # normal and anomalous images that a category needs to count in a mean
BROKEN = 0.1  # an AUROC that has lost more than this counts as broken
FEW = 0.2  # shares of anomalous images up to here are the reference


def rescoring_table(rows: pd.DataFrame, windows: str, published: pd.DataFrame) -> pd.DataFrame:
    """Return image metrics without and with RsCIN, and the gain beside the paper's, percent.

    Args:
        rows: Records of `rescored` of one method, means over categories are taken.
        windows: the window set that counts as "with".
        published: rows of Table 5 or 11 of one method, any data sets.
    """
    means = rows.groupby("windows")[list(IMAGE)].mean().mul(100).rename(columns=IMAGE)
    table = pd.DataFrame({"without": means.loc["none"], "with": means.loc[windows]})
    table["gain"] = table["with"] - table["without"]
    gains = []
    for dataset, part in published.groupby("dataset", sort=False):
        theirs = part.pivot_table(index="metric", columns="param_value", values="value").rename(index=IMAGE)
        gains.append(theirs["with"] - theirs["without"])
        table[f"gain, paper on {dataset}"] = gains[-1].reindex(table.index)
    table["difference"] = table["gain"] - pd.concat(gains, axis=1).mean(axis=1)
    return table.round(1)


def gains(rows: pd.DataFrame, windows: str) -> pd.DataFrame:
    """Return image AUROC (percent) without and with RsCIN for every method and category."""
    wide = rows.pivot_table(index="category", columns=["method", "windows"], values="auroc", sort=False) * 100
    table = {}
    for method in dict.fromkeys(rows["method"]):
        without, after = wide[method, "none"], wide[method, windows]
        table |= {(method, "without"): without, (method, "gain"): after - without}
    frame = pd.DataFrame(table)
    frame.loc["mean"] = frame.mean()
    return frame.round(1)


def neighbour_table(near: pd.DataFrame, rows: pd.DataFrame, windows: str) -> pd.DataFrame:
    """Return how often neighbours of anomalous images are anomalous, by chance and by token, and MuSc's gain."""
    near = near.set_index("category")
    gain = gains(rows[rows["method"] == "MuSc"], windows)["MuSc", "gain"]
    table = pd.DataFrame(
        {"anomalous among all others": near["share"] * 100, "among the two nearest": near["near"] * 100}
    )
    return table.assign(**{"gain of MuSc": gain.reindex(table.index)}).round(1)


def rescoring_verdict(rows: pd.DataFrame, windows: str, base: dict, page: str, *, method: str = "MuSc") -> Markdown:
    """Test Table 5's (MuSc) or Table 11's claim that RsCIN raises the image AUROC; record it."""
    wide = rows[rows["method"] == method].pivot_table(index="category", columns="windows", values="auroc")
    gain = wide[windows] - wide["none"]
    paper = load_published("musc", 5 if method == "MuSc" else 11).query("metric == 'auroc' and method == @method")
    printed = "".join(
        f"; paper, {name}: {part.set_index('param_value')['value'].loc[['without', 'with']].diff().iloc[-1]:+.1f}"
        for name, part in paper.groupby("dataset", sort=False)
    )
    return report.claim(
        f"musc-rscin-{method.lower().replace(' ', '-')}",
        f"Re-scoring by the image neighbourhood (RsCIN) raises the image AUROC of {method}.",
        bool(gain.mean() > 0) if abs(gain.mean()) > SAME / 5 else None,
        f"Mean change {100 * gain.mean():+.1f} points over {len(gain)} categories, up in {(gain > 0).sum()}, down in "
        f"{(gain < 0).sum()} (from {100 * gain.min():+.1f}, {gain.idxmin()}, to {100 * gain.max():+.1f}, "
        f"{gain.idxmax()}{printed}; {base['dataset']}, tokens of {base['encoder']}).",
        source="MuSc, 4.2 and Table 5" if method == "MuSc" else "MuSc, A.2.4 and Table 11",
        **keys_of(base, page),
    )


def token_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return image AUROC (percent, mean over categories) of scores from tokens, a column per window set."""
    means = rows.groupby(["dataset", "method", "windows"], sort=False)["auroc"].mean().mul(100).unstack("windows")
    return means[list(dict.fromkeys(rows["windows"]))].round(1)


def token_verdict(rows: pd.DataFrame, windows: dict[str, str], page: str, profile: str) -> Markdown:
    """Test whether RsCIN helps scores that were made from the same tokens, on the paper's own images."""
    means = rows.groupby(["dataset", "method", "windows"])["auroc"].mean()
    found = {(d, m): means[d, m, windows[d]] - means[d, m, "none"] for d, m, _ in means.index}
    text = "; ".join(f"{d}, {m}: {100 * gain:+.1f}" for (d, m), gain in found.items())
    return report.claim(
        "musc-rscin-tokens",
        "RsCIN with the paper's windows raises the image AUROC of scores made from CLIP class tokens alone.",
        all(gain > 0 for gain in found.values()),
        f"Change in points: {text}.",
        source="MuSc, A.2.4 and Table 11",
        page=page,
        profile=profile,
        dataset=", ".join(dict.fromkeys(rows["dataset"])),
        encoder="CLIP ViT-L/14-336",
        image_size=518,
    )


def reference_table(rows: pd.DataFrame, variant: str, table: int) -> pd.DataFrame:
    """Return AUROC for k reference images: ours (mean ± deviation over draws), our change, the paper's, the difference.

    Args:
        rows: Records of `reference_images`.
        variant: "MuSc" (Table 15) or "MuSc+" (Table 16); the change of both is against MuSc without references.
        table: number of the paper's table.
    """
    start = rows[rows["shots"] == 0].groupby("level")["auroc"].mean() * 100
    mine = rows[(rows["variant"] == variant) & (rows["shots"] > 0)]
    paper = load_published("musc", table)
    parts = {}
    for level in ("image", "pixel"):
        means = mine[mine["level"] == level].groupby(["shots", "reference_seed"])["auroc"].mean() * 100
        shots = means.groupby(level="shots")
        theirs = paper[paper["level"] == level].set_index("train_setting")["value"]
        named = {k: theirs.get(f"{k}-shot") for k in shots.groups}
        change = pd.Series({k: v - theirs["zero-shot"] for k, v in named.items() if v is not None})
        spread = shots.std(ddof=1).map(" ± {:.1f}".format).where(shots.size() > 1, "")
        part = pd.DataFrame({"ours": shots.mean().map("{:.1f}".format) + spread})
        part["change"] = (shots.mean() - start[level]).round(1)
        part["paper's change"] = change.round(1)
        part["difference"] = (part["change"] - part["paper's change"]).round(1)
        first = pd.DataFrame([[f"{start[level]:.1f}", 0.0, 0.0, 0.0]], columns=part.columns, index=[0])
        parts[f"{level} AUROC"] = pd.concat([first, part])
    return pd.concat(parts, axis=1).rename_axis("k")


def reference_verdicts(rows: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test what A.6 says of references: MuSc gains little from a few, MuSc+ needs many; record both."""
    image = rows[rows["level"] == "image"].groupby(["variant", "shots"])["auroc"].mean()
    zero, most = image["MuSc", 0], max(rows["shots"])
    few = [k for k in sorted(set(rows["shots"])) if 0 < k <= 8]
    changes = {k: 100 * (image["MuSc", k] - zero) for k in few}
    text = ", ".join(f"k = {k}: {change:+.1f}" for k, change in changes.items())
    plus = {k: 100 * (image["MuSc+", k] - zero) for k in (few[0], most)}
    theirs = {
        t: load_published("musc", t).query("level == 'image'").set_index("train_setting")["value"] for t in (15, 16)
    }
    theirs = {t: values - values["zero-shot"] for t, values in theirs.items()}
    printed = ", ".join(f"k = {k}: {theirs[15][f'{k}-shot']:+.1f}" for k in few)
    where = f"{base['dataset']}, {rows['category'].nunique()} categories, {rows['reference_seed'].nunique()} draws"
    return [
        report.claim(
            "musc-few-references",
            "Up to eight normal reference images change MuSc's image AUROC by less than a point.",
            bool(max(abs(change) for change in changes.values()) < 1),
            f"Change in points: {text} ({where}; paper: {printed}).",
            source="MuSc, A.6.1 and Table 15",
            **keys_of(base, page),
        ),
        report.claim(
            "musc-plus-needs-references",
            "With one reference image, MuSc+ scores worse than MuSc does without any; with many it scores better.",
            bool(plus[few[0]] < 0 < plus[most]),
            f"Image AUROC against MuSc without references: {plus[few[0]]:+.1f} points for k = {few[0]}, "
            f"{plus[most]:+.1f} for k = {most} ({where}; paper: {theirs[16][f'{few[0]}-shot']:+.1f} for k = {few[0]}, "
            f"{theirs[16][f'{most}-shot']:+.1f} for k = {most}).",
            source="MuSc, A.6.2 and Table 16",
            **keys_of(base, page),
        ),
    ]


def encoder_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return AUROC and AUPRO (percent, mean over categories) for every encoder and resolution."""
    keys = ["encoder", "image_size"]
    parts = {
        f"{level} {name}": rows[rows["level"] == level].groupby(keys)[metric].mean() * 100
        for level, metric, name in (
            ("image", "auroc", "AUROC"),
            ("pixel", "auroc", "AUROC"),
            ("pixel", "aupro", "AUPRO"),
        )
    }
    return pd.DataFrame(parts).round(1).rename_axis(["encoder", "pixels"])


def paper_encoders() -> pd.DataFrame:
    """Return Table 8: image and pixel AUROC of MuSc with eleven backbones."""
    paper = load_published("musc", 8)
    paper = paper.assign(backbone=paper["param_value"].str.replace("|", ", ").str.removeprefix("-, "))
    wide = paper.pivot_table(index="backbone", columns=["dataset", "level"], values="value", sort=False)
    return wide.rename(columns={"image": "image AUROC", "pixel": "pixel AUROC"}, level=1).rename_axis(
        (None, None), axis=1
    )


def encoder_beside_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Return our DINOv2 at its best resolution beside the paper's smallest DINOv2, and CNN against transformer in both.

    The paper's windowed transformer (Swin-B) stands beside our CNN: both have coarse stages and no class token.
    """
    table, paper = encoder_table(rows), load_published("musc", 8).query("dataset == 'MVTec AD'")
    theirs = paper.pivot_table(index="param_value", columns="level", values="value")
    pairs = {
        "DINOv2 (ours ViT-S/14, paper ViT-B/14)": ("dinov2_vits14", "DINOv2|ViT-B-14|LVD-142M"),
        "no plain transformer (ours EfficientNet-Lite0, paper Swin-B)": (
            "efficientnet_lite0",
            "-|Swin-B-4|ImageNet-22k",
        ),
    }
    found = {}
    for name, (encoder, printed) in pairs.items():
        if encoder in table.index.get_level_values(0):
            for level in ("image", "pixel"):
                ours = table.loc[encoder][f"{level} AUROC"].max()
                found[name, level] = [ours, theirs.loc[printed, level], ours - theirs.loc[printed, level]]
    return pd.DataFrame(found, index=["ours, best resolution", "paper, MVTec AD", "difference"]).T.round(1)


def resolution_verdict(rows: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test that more patches per image help (A.2.1): the highest resolution beats the lowest."""
    mine = rows[rows["encoder"] == base["encoder"]]
    means = mine.groupby(["level", "image_size"])["auroc"].mean().mul(100).unstack()
    low, high = means.columns.min(), means.columns.max()
    text = "; ".join(
        f"{level}: " + ", ".join(f"{value:.1f} % at {size} px" for size, value in means.loc[level].items())
        for level in ("image", "pixel")
    )
    return report.claim(
        "musc-resolution",
        "A higher resolution, hence more and smaller patches, raises MuSc's image and pixel AUROC.",
        bool((means.loc[["image", "pixel"], high] > means.loc[["image", "pixel"], low]).all()),
        f"{text} ({base['dataset']}, {mine['category'].nunique()} categories, {base['encoder']}).",
        source="MuSc, A.2.1 and Table 8",
        **keys_of(base, page),
    )


def turn_table(rows: pd.DataFrame, level: str) -> pd.DataFrame:
    """Return AUROC (percent) per category in the four ways, what turning costs and what the nearest turn gives.

    The mean is over categories with at least `FEWEST` normal and anomalous images in the sample: an AUROC over one
    normal image measures that image.
    """
    counts = rows[rows["level"] == "image"].groupby("category")[["n_normal", "n_anomalous"]].first().min(axis=1)
    mine = rows[rows["level"] == level]
    table = mine.groupby(["category", "way"], sort=False)["auroc"].mean().mul(100).unstack("way")[TURNS]
    table.loc["mean"] = table[counts.reindex(table.index) >= FEWEST].mean()
    table["loss by turning"] = table[TURNS[2]] - table[TURNS[0]]
    table["gain, as they are"] = table[TURNS[1]] - table[TURNS[0]]
    table["gain, turned"] = table[TURNS[3]] - table[TURNS[2]]
    return table.round(1)


def turn_beside_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what inconsistent orientation costs: our loss by turning beside Table 12's gap between classes."""
    paper = load_published("musc", 12).query("method == 'MuSc' and `class` in ('mean', 'mean_all')")
    table = {}
    for level in ("image", "pixel"):
        theirs = paper[paper["level"] == level].set_index("class")["value"]
        ours = turn_table(rows, level).loc["mean", "loss by turning"]
        gap = theirs["mean"] - theirs["mean_all"]
        table[f"{level} AUROC"] = [ours, gap, ours - gap]
    return pd.DataFrame(table, index=["ours: turned - as they are", "paper: 5 such classes - all", "difference"]).round(
        1
    )


def turn_verdicts(rows: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test that turned images cost MuSc image AUROC (A.3), and what comparing with four turns gives."""
    image = turn_table(rows, "image")
    counts = rows[rows["level"] == "image"].groupby("category")[["n_normal", "n_anomalous"]].first().min(axis=1)
    image = image.drop(counts.index[counts < FEWEST])
    loss, back = image.loc["mean", "loss by turning"], image.loc["mean", "gain, turned"]
    upright = image["gain, as they are"].drop("mean")
    where = f"{base['dataset']}, {len(image) - 1} categories, {rows['turn_seed'].nunique()} draws of quarter turns"
    worst = image.drop("mean")["loss by turning"].idxmin()
    gap = turn_beside_paper(rows).loc["paper: 5 such classes - all", "image AUROC"]
    return [
        report.claim(
            "musc-orientation",
            "Images in inconsistent orientation cost MuSc image AUROC.",
            bool(loss < -100 * SAME),
            f"{loss:+.1f} points on average, {image.loc[worst, 'loss by turning']:+.1f} at worst ({worst}; {where}; in "
            f"the paper, classes of inconsistent orientation lie {-gap:.1f} below the mean of all).",
            source="MuSc, A.3 and Table 12",
            **keys_of(base, page),
        ),
        report.claim(
            "musc-orientation-remedy",
            "Taking the nearest of an image's four turns wins back at least half of that loss.",
            bool(back >= -loss / 2) if loss < -100 * SAME else None,
            f"{back:+.1f} points after a loss of {-loss:.1f} ({where}).",
            source="this book's own",
            **keys_of(base, page),
        ),
        report.claim(
            "musc-nearest-turn",
            "Comparing with the nearest of four turns raises MuSc's image AUROC on images as they are, too.",
            bool(upright.mean() > 100 * SAME),
            f"{upright.mean():+.1f} points on average, most for {upright.idxmax()} ({upright.max():+.1f}), least for "
            f"{upright.idxmin()} ({upright.min():+.1f}; {base['dataset']}, {len(upright)} categories).",
            source="this book's own",
            **keys_of(base, page),
        ),
    ]


def overlap_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return overlap of the densities and patch AUROC (percent) of both averages, per category."""
    mine = rows[(rows["quantity"] != "distances") & (rows["kind"] == "normal")]
    wide = mine.pivot_table(index="category", columns="quantity", values=["overlap", "patch_auroc"], sort=False) * 100
    wide.loc["mean"] = wide.mean()
    return wide.rename(columns={"patch_auroc": "patch AUROC"}, level=0).rename_axis((None, None), axis=1).round(1)


def interval_verdict(rows: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test Figure 4's claim: the interval average separates normal from anomalous patches better than the full mean."""
    table = overlap_table(rows)
    auroc, overlap = table["patch AUROC"], table["overlap"]
    part, full = "mean of the nearest 30 %", "mean of all"
    better = (auroc[part] > auroc[full]).drop("mean")
    return report.claim(
        "musc-interval-separates",
        "The mean of the nearest 30 % separates normal from anomalous patches better than the mean of all images.",
        bool(auroc.loc["mean", part] > auroc.loc["mean", full]),
        f"Patch AUROC {auroc.loc['mean', part]:.1f} against {auroc.loc['mean', full]:.1f} %, overlap of the densities "
        f"{overlap.loc['mean', part]:.0f} against {overlap.loc['mean', full]:.0f} %; better in {better.sum()} of "
        f"{len(better)} categories ({base['dataset']}).",
        source="MuSc, 3.2 and Figure 4",
        **keys_of(base, page),
    )


def share_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return image and patch AUROC (percent) per share of anomalous images: mean and lowest category."""
    means = rows.groupby(["nominal_share", "category"])[["auroc", "patch_auroc"]].mean().mul(100)
    grouped = means.groupby(level="nominal_share")
    table = pd.concat({"mean": grouped.mean(), "lowest category": grouped.min()}, axis=1).swaplevel(axis=1)
    names = {"auroc": "image AUROC", "patch_auroc": "patch AUROC"}
    table = table.rename(columns=names, level=0).sort_index(axis=1, level=0, sort_remaining=False)
    table.insert(0, ("categories", ""), grouped.size())
    table.index = [f"{share:.0%}" for share in table.index]
    return table.rename_axis("anomalous").round(1)


def share_verdict(rows: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Find the share of anomalous images from which on patches are no longer told apart as well; record it."""
    means = rows.groupby(["nominal_share", "category"])[["auroc", "patch_auroc"]].mean().groupby(level=0).mean()
    lost = means[means.index <= FEW].mean() - means  # (shares, 2)
    broken = {column: [share for share in means.index if lost[column][share] > BROKEN] for column in means}
    parts = []
    for column, name in (("auroc", "Image AUROC"), ("patch_auroc", "Patch AUROC")):
        text = ", ".join(f"{share:.0%}: {100 * value:.1f}" for share, value in means[column].items())
        found = f"lost from {broken[column][0]:.0%} on" if broken[column] else "lost nowhere"
        parts.append(f"{name} in percent by share: {text}; more than {100 * BROKEN:.0f} points are {found}")
    return report.claim(
        "musc-anomaly-share",
        "With up to half of the pile anomalous, MuSc's image and patch AUROC lose at most 10 points.",
        bool((lost[lost.index <= 0.5] <= BROKEN).all(axis=None)),
        f"{'. '.join(parts)} (against the mean up to {FEW:.0%}; {base['dataset']}, "
        f"piles of {rows['pile_size'].iloc[0]} images).",
        source="this book's own",
        **keys_of(base, page),
    )
