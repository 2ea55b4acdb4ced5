"""What memory banks cost: measured seconds beside the cost model of HierCore's equations 5 and 6 (Table 6)."""

from __future__ import annotations

import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.book.bench import plain_coreset
from hclib.book.experiments import draw_per_category, features_of, split
from hclib.book.figures import METHOD_COLOURS
from hclib.evaluation.published import load_published
from hclib.kernels.clustering import clusters_from_labels, semantic_clusters
from hclib.kernels.coreset import greedy_coreset, random_projection
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.methods import HierCore, PatchCore
from hclib.methods.hiercore import image_tokens
from hclib.methods.patchcore import patch_blocks


def bank_cost(config: dict) -> pd.DataFrame:
    """Measure building one bank for all images and one bank per group, and scoring against them.

    Args:
        config: `dataset, encoder, image_size, seed`; `categories`, how many of the data set's (in alphabetical order);
            `train_per_category`, `test_images`; `copies`, how often the training set is repeated with noise;
            `ratio`; `plain_share`, share of the plain traversal's picks that is timed (its time is proportional to
            them), 0 to leave it out.

    Returns:
        One row per method: `images, patches, groups, bank_entries, group_patches, cluster_seconds, lazy_seconds` (the
        whole of `fit`), `plain_seconds` (the same with the plain traversal, extrapolated), `score_seconds`,
        `test_images`, `encoder_seconds` (for the test images), `bank_mb`, `selection_mb` (projected patches of the
        largest bank under construction, twice).
    """
    train, test = split(features_of(config))
    names = sorted(train.index["category"].unique())[: config["categories"]]
    train, test = (part.subset(part.index["category"].isin(names).to_numpy()) for part in (train, test))
    train = draw_per_category(train, config["train_per_category"], config["seed"])
    train = repeat_with_noise(train, config["copies"], config["seed"])
    test = draw_per_category(test, max(1, config["test_images"] // len(names)), config["seed"])
    encoder_seconds = time_encoder(config, test)
    rows = []
    for method in ("PatchCore", "HierCore"):
        rows.append({"method": method, "images": len(train), "test_images": len(test)})
        rows[-1] |= _measure(method, train, test, config) | {"encoder_seconds": encoder_seconds}
    return pd.DataFrame(rows)


def _measure(method: str, train: Features, test: Features, config: dict) -> dict:
    options = {"ratio": config["ratio"], "seed": config["seed"]}
    start = time.perf_counter()
    detector = {"PatchCore": PatchCore, "HierCore": HierCore}[method](**options).fit(train)
    fitted = time.perf_counter()
    detector.score(test)
    scored = time.perf_counter()
    if method == "HierCore":
        tokens = image_tokens(train)
        again = time.perf_counter()
        semantic_clusters(tokens)
        cluster_seconds = time.perf_counter() - again
        group, banks = detector.route(tokens), detector.banks
    else:
        cluster_seconds, group, banks = 0.0, np.zeros(len(train), int), [detector.bank]
    members = [train.subset(np.flatnonzero(group == k)) for k in np.unique(group)]
    traversals = [time_traversals(part, config) for part in members] if config["plain_share"] else []
    lazy, plain = (sum(pair[i] for pair in traversals) for i in (0, 1)) if traversals else (0.0, np.nan)
    patches = [len(part) * next(iter(train.maps.values()))[0, :, :, 0].size for part in members]
    return {
        "patches": sum(patches),
        "groups": len(banks),
        "group_patches": patches,
        "bank_entries": sum(len(bank) for bank in banks),
        "cluster_seconds": cluster_seconds,
        "lazy_seconds": fitted - start,
        "plain_seconds": fitted - start - lazy + plain,
        "score_seconds": scored - fitted,
        "bank_mb": sum(bank.points.nbytes for bank in banks) / 2**20,
        "selection_mb": 2 * max(patches) * 128 * 4 / 2**20,
    }


def time_traversals(features: Features, config: dict) -> tuple[float, float]:
    """Return the seconds of the lazy traversal and of the plain one, the latter from a share of its picks."""
    blocks = (block.flatten(0, 2) for block in patch_blocks(features))
    points = torch.cat([random_projection(block, 128, seed=config["seed"]) for block in blocks])  # (P, 128)
    size = max(1, int(len(points) * config["ratio"]))
    start = time.perf_counter()
    greedy_coreset(points, size)
    lazy = time.perf_counter() - start
    picks = max(2, int(size * config["plain_share"]))
    start = time.perf_counter()
    plain_coreset(points, picks)
    return lazy, (time.perf_counter() - start) * size / picks


def time_encoder(config: dict, test: Features, images: int = 16) -> float:
    """Return the seconds that reading and encoding the test images takes, from up to `images` of them."""
    encoder = load_encoder(config["encoder"], config["image_size"])
    paths = test.index["path"].tolist()[:images]
    encoder.forward(encoder.prepare(paths[:2]))
    start = time.perf_counter()
    for i in range(0, len(paths), 8):
        encoder.forward(encoder.prepare(paths[i : i + 8]))
    return (time.perf_counter() - start) * len(test) / len(paths)


def repeat_with_noise(features: Features, copies: int, seed: int) -> Features:
    """Return a set `copies` times as large; further copies get Gaussian noise of a tenth of each map's deviation."""
    if copies == 1:
        return features
    rng = np.random.default_rng(seed)

    def noisy(values: np.ndarray, number: int) -> np.ndarray:
        scale = 0.1 * float(values.std()) if number else 0.0
        return values + rng.standard_normal(values.shape, dtype=np.float32) * np.float32(scale)

    maps = {
        layer: np.concatenate([noisy(np.asarray(base, np.float32), k).astype(np.float16) for k in range(copies)])
        for layer, base in features.maps.items()
    }
    tokens = np.concatenate([noisy(features.tokens, k) for k in range(copies)])
    return Features(maps, tokens, pd.concat([features.index] * copies, ignore_index=True), features.encoder)


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Return Table 6's layout for one set: a row per method, seconds and images per second, means over seeds."""
    means = costs.groupby("method", sort=False).mean(numeric_only=True)
    table = pd.DataFrame(
        {
            "groups": means["groups"].round(1),
            "bank entries": means["bank_entries"].round().astype(int),
            "FINCH, s": means["cluster_seconds"].round(1),
            "banks, lazy, s": means["lazy_seconds"].round(1),
            "banks, plain, s": means["plain_seconds"].round(0),
            "evaluation, s": (means["score_seconds"] + means["encoder_seconds"]).round(1),
            "images/s": (means["test_images"] / (means["score_seconds"] + means["encoder_seconds"])).round(1),
            "images/s without encoder": (means["test_images"] / means["score_seconds"]).round(1),
            "banks, MB": means["bank_mb"].round(1),
            "selection, MB": means["selection_mb"].round(0),
        }
    )
    return table.T


def speedups(costs: pd.DataFrame) -> pd.DataFrame:
    """Return PatchCore / HierCore ratios for every size of the set, with what equations 5 and 6 predict.

    Returns:
        One row per size of the set: `images`, `cost model` (P squared over the sum of the groups'
        P_i squared), `banks, plain`, `banks, lazy`, `scoring`.
    """
    rows = []
    for keys, part in costs.groupby(["categories", "train_per_category", "copies"]):
        means = part.groupby("method")[["plain_seconds", "lazy_seconds", "score_seconds"]].mean()
        ratio = means.loc["PatchCore"] / means.loc["HierCore"]
        groups = part[part["method"] == "HierCore"]["group_patches"]
        model = np.mean([sum(sizes) ** 2 / sum(size**2 for size in sizes) for sizes in groups])
        rows.append(
            (*keys, int(part["images"].iloc[0]), model, *ratio[["plain_seconds", "lazy_seconds", "score_seconds"]])
        )
    columns = [
        "categories",
        "train_per_category",
        "copies",
        "images",
        "cost model",
        "banks, plain",
        "banks, lazy",
        "scoring",
    ]
    return pd.DataFrame(rows, columns=columns)


def paper_speedups() -> pd.DataFrame:
    """Return PatchCore / HierCore ratios of Table 6: bank building (FINCH included), evaluation, images per second."""
    table = load_published("hiercore", "6")
    values = table.assign(value=table["value"].astype(float)).set_index(["dataset", "method", "param_value"])["value"]
    rows = {}
    for name in dict.fromkeys(table["dataset"]):
        ours, theirs = values[name]["HierCore"], values[name]["PatchCore"]
        rows[name] = {
            "banks": theirs["memory_bank"] / (ours["memory_bank"] + ours["memory_bank_finch"]),
            "evaluation": theirs["evaluation_of_test_set"] / ours["evaluation_of_test_set"],
            "images per second": ours["inference"] / theirs["inference"],
        }
    return pd.DataFrame(rows).T.rename_axis("paper's data set")


def speedup_curves(table: pd.DataFrame) -> Figure:
    """Draw the ratios PatchCore / HierCore against the number of categories and against the number of images."""
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.0), sharey=True)
    whole = table["categories"] == table["categories"].max()
    base = table["train_per_category"] == table["train_per_category"].min()
    panels = [
        (table[base & (table["copies"] == 1)], "categories", "categories"),
        (table[whole & base], "images", "training images, all categories"),
    ]
    styles = {
        "cost model": ("0.35", ":", "none", "Eqs. 5, 6"),
        "banks, plain": (METHOD_COLOURS["PatchCore"], "-", "o", "banks, plain traversal"),
        "banks, lazy": (METHOD_COLOURS["HierCore"], "-", "s", "banks, lazy traversal"),
        "scoring": ("#009E73", "--", "^", "scoring, no encoder"),
    }
    for ax, (rows, column, label) in zip(axes, panels, strict=True):
        rows = rows.sort_values(column)
        for name, (colour, line, marker, text) in styles.items():
            ax.plot(rows[column], rows[name], line, color=colour, marker=marker, markersize=4, label=text)
        ax.set_xlabel(label)
        ax.axhline(1, color="0.6", linewidth=0.8)
    axes[0].set_ylim(0, 1.05 * table[list(styles)].max().max())
    axes[0].set_ylabel("PatchCore / HierCore")
    axes[0].legend(fontsize=7)
    return figure


def extension(config: dict) -> pd.DataFrame:
    """Measure `HierCore.extend` with the last category against fitting all categories anew, with class labels.

    Returns:
        One row: seconds of both, whether all banks are the same bytes, entries added.
    """
    train, test = split(features_of(config))
    train = draw_per_category(train, config["train_per_category"], config["seed"])
    labels = train.index["category"].to_numpy()
    last = labels == sorted(set(labels))[-1]
    options = {"ratio": config["ratio"], "seed": config["seed"]}
    grown = HierCore(**options).fit(train.subset(~last), list(labels[~last]))
    start = time.perf_counter()
    grown.extend(train.subset(last), list(labels[last]))
    middle = time.perf_counter()
    rebuilt = HierCore(**options).fit(train, list(labels))
    end = time.perf_counter()
    same = all(torch.equal(a.points, b.points) for a, b in zip(grown.banks, rebuilt.banks, strict=True))
    keys = clusters_from_labels(train.tokens, labels).keys
    return pd.DataFrame(
        [
            {
                "extend_seconds": middle - start,
                "rebuild_seconds": end - middle,
                "same_banks": same,
                "same_keys": bool(np.array_equal(grown.keys.numpy(), keys)),
                "entries_added": len(grown.banks[-1]),
            }
        ]
    )


def _whole_set(whole: pd.Series, equal: pd.Series, column: str) -> str:
    """Return the same ratio on all images, whose categories differ in size, as a clause; empty where not measured."""
    if whole["images"] == equal["images"]:
        return ""
    return f"; all {int(whole['images'])} images {whole[column]:.1f}, cost model {whole['cost model']:.1f}"


def cost_verdicts(table: pd.DataFrame, base: dict, page: str = "14_hiercore_cost") -> list[Markdown]:
    """Test Table 6's claims on the largest set and over the number of categories; record and return the sentences."""
    keys = {k: base[k] for k in ("profile", "dataset", "encoder", "image_size")} | {"page": page}
    once = table[table["copies"] == 1]
    equal = once[once["train_per_category"] == once["train_per_category"].min()]
    few, many = (equal.loc[equal["categories"].agg(kind)] for kind in ("idxmin", "idxmax"))
    whole = once.loc[once["images"].idxmax()]
    each = f"up to {int(many['train_per_category'])} of each of {int(many['categories'])} categories"
    where = f"{base['dataset']}, {int(many['images'])} training images, {each}"
    source, paper = "HierCore, 3.4 and Table 6", paper_speedups()
    growth = f"{few['categories']:.0f} to {many['categories']:.0f} categories"
    return [
        report.claim(
            f"banks-are-built-faster-{kind}",
            f"Building HierCore's banks takes less than a quarter of the time of PatchCore's, with {text}.",
            bool(many[f"banks, {kind}"] >= 4),
            f"PatchCore / HierCore {many[f'banks, {kind}']:.1f}, cost model {many['cost model']:.1f} ({where})"
            + _whole_set(whole, many, f"banks, {kind}")
            + f"; the paper's four data sets {paper['banks'].min():.1f} to {paper['banks'].max():.1f}.",
            source=source,
            **keys,
        )
        for kind, text in (
            ("plain", "the traversal of the published programs"),
            ("lazy", "this book's lazy traversal"),
        )
    ] + [
        report.claim(
            "advantage-grows-with-categories",
            "The advantage in building banks grows with the number of categories.",
            bool(many["banks, plain"] > few["banks, plain"] and many["banks, lazy"] > few["banks, lazy"]),
            f"From {growth}: plain traversal {few['banks, plain']:.1f} to {many['banks, plain']:.1f}, lazy traversal "
            f"{few['banks, lazy']:.1f} to {many['banks, lazy']:.1f} ({base['dataset']}).",
            source=source,
            **keys,
        ),
        report.claim(
            "scoring-is-faster",
            "Scoring without the encoder takes less than half the time.",
            bool(many["scoring"] >= 2),
            f"PatchCore / HierCore {many['scoring']:.1f} ({where}){_whole_set(whole, many, 'scoring')}; the paper, "
            f"with encoder: {paper['evaluation'].min():.1f} to {paper['evaluation'].max():.1f}.",
            source=source,
            **keys,
        ),
    ]
