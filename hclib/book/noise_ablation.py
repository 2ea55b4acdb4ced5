"""Tables and verdicts of FUN-AD's ablations (its supplementary Tables 2 to 5), ours beside the paper's."""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.experiments import METHODS
from hclib.book.figures import METHOD_COLOURS
from hclib.book.noise_experiments import noisy_features
from hclib.evaluation.published import load_published

STUDIES = {  # name -> (number of the paper's table, our column, the paper's values as ours)
    "smoothness": ("3", "options.smoothness", float),
    "memory": ("4", "options.memory_ratio", float),
    "y_syn": ("5", "options.synthetic_labels", lambda text: text == "with"),
}


def ablation_table(results: pd.DataFrame, study: str) -> pd.DataFrame:
    """Return ours (last and best epoch, mean ± spread over seeds), the paper's, and the difference of the best.

    Args:
        results: Records of `noise_run`, with the study's name in `study`.
        study: "smoothness", "memory" or "y_syn".
    """
    number, column, read = STUDIES[study]
    rows = results[(results["study"] == study) & (results["category"] == "mean") & (results["test_set"] == "own")]
    rows = rows.assign(value=rows[column])
    text = report.spread(rows, ["level", "value", "epoch"], "auroc", scale=100, digits=1).unstack("epoch")
    best = rows[rows["epoch"] == "test"].groupby(["level", "value"])["auroc"].mean() * 100
    paper = load_published("funad", number)
    paper.index = pd.MultiIndex.from_arrays([paper["level"], paper["param_value"].map(read)], names=["level", "value"])
    table = text.rename(columns={"last": "ours, last epoch", "test": "ours, best epoch"})
    table["paper"] = paper["value"].reindex(table.index)
    table["difference"] = (best - table["paper"]).round(1)
    return table.rename_axis(columns="AUROC in %").rename_axis(index=["level", column.removeprefix("options.")])


def ablation_figure(results: pd.DataFrame) -> Figure:
    """Draw image and pixel AUROC (last epoch) over lambda and over the sampling ratio, ± the spread over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 2.8), sharey=True)
    for ax, study, title in zip(
        axes, ("smoothness", "memory"), ("weight λ", "share of patches in memory"), strict=True
    ):
        rows = results[(results["study"] == study) & (results["category"] == "mean") & (results["epoch"] == "last")]
        for level, style in (("image", "-"), ("pixel", "--")):
            mine = rows[(rows["level"] == level) & (rows["test_set"] == "own")].groupby(STUDIES[study][1])["auroc"]
            values = [f"{v:g}" for v in mine.mean().index]
            spread = mine.std().fillna(0) * 100
            look = {"marker": "o", "ms": 4, "capsize": 3, "color": METHOD_COLOURS["FUN-AD"]}
            ax.errorbar(values, mine.mean() * 100, spread, ls=style, label=level, **look)
        ax.set_xlabel(title)
    axes[0].set_ylabel("AUROC in %, last epoch")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def ablation_verdicts(results: pd.DataFrame, base: dict, page: str) -> list[Markdown]:
    """Test the conclusions of Tables 3, 4 and 5 on the last epoch, and record them.

    A difference counts where it exceeds the spread over seeds; with one seed none does.
    """
    rows = results[(results["category"] == "mean") & (results["test_set"] == "own") & (results["epoch"] == "last")]
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    tested = rows[rows["level"] == "image"].iloc[0]
    where = (
        f"{base['dataset']}, {base['encoder']} at {base['image_size']} px, last epoch, {report.seeds(rows)}, "
        f"{tested['n_normal']:g} normal and {tested['n_anomalous']:g} anomalous test images"
    )
    smooth, memory, marked = (_means(rows, study) for study in STUDIES)
    noise = {study: _spread(rows, study) for study in STUDIES}
    span, gain = memory.max() - memory.min(), marked.loc[True] - marked.loc[False]
    over, lead = smooth.loc[2.5] - smooth.loc[0], smooth.drop(index=2.5).max() - smooth.loc[2.5]
    claims = [
        (
            "smoothness",
            "funad-lambda",
            "The mutual smoothness loss helps, and its best weight is 2.5, at both levels.",
            _decided((over > noise["smoothness"]) & (lead < 0), (lead > noise["smoothness"])),
            ", ".join(f"{level}: best at {smooth[level].idxmax():g} ({smooth[level].max():.1f} %)" for level in smooth)
            + f"; at 2.5 {smooth.loc[2.5, 'image']:.1f} and {smooth.loc[2.5, 'pixel']:.1f} %"
            + f"; without it {smooth.loc[0, 'image']:.1f} and {smooth.loc[0, 'pixel']:.1f} %",
        ),
        (
            "memory",
            "funad-sampling",
            "The sampling ratio of the memory hardly matters (less than one point of AUROC).",
            _decided(span < 1, (span > 1) & (span > 2 * noise["memory"])),
            f"it moves image AUROC by {span['image']:.1f} and pixel AUROC by {span['pixel']:.1f} points",
        ),
        (
            "y_syn",
            "funad-ysyn",
            "Labels of synthetic anomalies (y_syn) improve both levels.",
            _decided(gain > noise["y_syn"], gain < -noise["y_syn"]),
            f"image {gain['image']:+.1f}, pixel {gain['pixel']:+.1f} points",
        ),
    ]
    return [
        report.claim(
            name,
            text,
            holds,
            f"{evidence}; spread over seeds {_quoted(noise[study])} ({where}).",
            source=f"FUN-AD, supplementary Table {STUDIES[study][0]}",
            **keys,
        )
        for study, name, text, holds, evidence in claims
    ]


def _means(rows: pd.DataFrame, study: str) -> pd.DataFrame:
    """Return mean AUROC in percent, setting x level."""
    mine = rows[rows["study"] == study]
    return mine.groupby([STUDIES[study][1], "level"])["auroc"].mean().unstack("level") * 100


def _spread(rows: pd.DataFrame, study: str) -> pd.Series:
    """Return, per level, the standard deviation over seeds, pooled over settings, in points; NaN with one seed."""
    mine = rows[rows["study"] == study]
    return mine.groupby([STUDIES[study][1], "level"])["auroc"].var().groupby("level").mean() ** 0.5 * 100


def _decided(for_it: pd.Series, against: pd.Series) -> bool | None:
    """Return True where both levels speak for a claim, False where one speaks against it, None otherwise."""
    return True if for_it.all() else False if against.any() else None


def _quoted(spread: pd.Series) -> str:
    return "unknown" if spread.isna().any() else f"{spread['image']:.1f} and {spread['pixel']:.1f} points"


def throughput_run(config: dict) -> pd.DataFrame:
    """Return the scoring time of every method of `config["methods"]` on the same test features, in one process.

    Args:
        config: as for `noisy_features`, with `methods` (class name -> options), `seed`, and `repeats`, of which the
            fastest counts.

    Returns:
        One row per method: `method, seconds_per_image, entries` (of the bank; 0 for FUN-AD), `images`.
    """
    rows = []
    for name, options in config["methods"].items():
        train, test, _ = noisy_features({k: v for k, v in config.items() if k != "components" or name != "FunAD"})
        detector = METHODS[name](seed=config["seed"], **options).fit(train)
        times = []
        for _ in range(config["repeats"]):
            start = time.perf_counter()
            detector.score(test)
            times.append(time.perf_counter() - start)
        bank = getattr(detector, "bank", None)
        entries = 0 if bank is None else len(bank)
        rows.append(
            {"method": name, "seconds_per_image": min(times) / len(test), "entries": entries, "images": len(test)}
        )
    return pd.DataFrame(rows)


def throughput_table(results: pd.DataFrame, encode_seconds: float) -> pd.DataFrame:
    """Return images per second with and without encoding, as ratios to SoftPatch, beside the paper's Table 2."""
    names = results["method"].replace("FunAD", "FUN-AD")
    scoring = pd.Series(results["seconds_per_image"].to_numpy(), index=names)
    paper = load_published("funad", "2").set_index("method")["value"]
    table = pd.DataFrame({"bank entries": results["entries"].to_numpy()}, index=names)
    table["images/s, scoring"], table["images/s, with encoder"] = 1 / scoring, 1 / (scoring + encode_seconds)
    for column in ("images/s, scoring", "images/s, with encoder"):
        table[column.replace("images/s", "ratio")] = table[column] / table.loc["SoftPatch", column]
    table["ratio, paper"] = paper / paper["SoftPatch"]
    table["difference"] = table["ratio, with encoder"] - table["ratio, paper"]
    return table.rename_axis(None).round(2)


def throughput_verdict(table: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test the order and the factor of Table 2, and record it."""
    ratio = table["ratio, with encoder"]
    return report.claim(
        "funad-throughput",
        "FUN-AD scores images faster than SoftPatch, and SoftPatch faster than InReaCh.",
        bool(ratio["FUN-AD"] > ratio["SoftPatch"] > ratio["InReaCh"]),
        f"With the encoder: FUN-AD {ratio['FUN-AD']:.2f} and InReaCh {ratio['InReaCh']:.2f} times SoftPatch (paper: "
        f"{table.loc['FUN-AD', 'ratio, paper']:.1f} and {table.loc['InReaCh', 'ratio, paper']:.1f}); scoring alone "
        f"{table.loc['FUN-AD', 'ratio, scoring']:.1f} and {table.loc['InReaCh', 'ratio, scoring']:.1f} "
        f"({base['dataset']}, {base['encoder']} at {base['image_size']} px, one run on a CPU).",
        source="FUN-AD, supplementary Table 2",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )


def encoding_seconds(config: dict) -> pd.DataFrame:
    """Return the seconds that the encoder takes per image, from 16 images encoded without a cache."""
    import tempfile

    from hclib.data.datasets import load_index
    from hclib.kernels.encoders import load_encoder

    name, _, category = config["dataset"].partition(":")
    index = load_index(name, categories=[category] if category else None).head(24)
    encoder = load_encoder(config["encoder"], config["image_size"])
    with tempfile.TemporaryDirectory() as folder:
        encoder.extract(index.head(8), cache=f"{folder}/warm", progress=False)
        start = time.perf_counter()
        encoder.extract(index.tail(16), cache=f"{folder}/cold", progress=False)
    return pd.DataFrame([{"encode_seconds_per_image": (time.perf_counter() - start) / 16}])
