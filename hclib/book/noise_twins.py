"""Twins in Magnetic Tile Defects: the same region under other exposures, on both sides of a split without overlap.

Files are called `exp<exposure>_num_<number>`. Sorted by number, the images of one region follow each other with a
growing exposure, up to six of them; nothing else in the data set says which images show the same region.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.book.experiments import dataset_features
from hclib.book.noise_experiments import fit_noisy
from hclib.book.noise_tables import ORDER, named
from hclib.data.contamination import contaminate
from hclib.evaluation.scenarios import evaluate

_NAME = r"exp(?P<exposure>\d+)_num_(?P<number>\d+)\.[A-Za-z]+$"
GROUPS = ("a twin was injected", "no twin was injected")


def regions(index: pd.DataFrame) -> pd.Series:
    """Return the number of the region that every image shows, read from MTD's file names (inferred, see above).

    Args:
        index: index frame; images of one region have one category and one kind of defect.

    Returns:
        One integer per row. An image whose name has no exposure and number is a region by itself.
    """
    names = index["path"].str.extract(_NAME).astype(float)
    frame = names.assign(category=index["category"], defect=index["defect"])
    frame = frame.sort_values(["category", "defect", "number"], kind="stable")
    same = (frame[["category", "defect"]] == frame[["category", "defect"]].shift()).all(axis=1)
    follows = same & (frame["exposure"] > frame["exposure"].shift())  # never true where the name says nothing
    return (~follows).cumsum().reindex(index.index).rename("region")


def injected(index: pd.DataFrame, noise: dict) -> tuple[pd.Series, pd.Series]:
    """Return, per row of a clean index, whether it was injected, and whether an image of its region was."""
    moved = index["path"].isin(contaminate(index, **noise)[1]["path"])
    region = regions(index)
    return moved, region.isin(region[moved])


def twin_counts(index: pd.DataFrame, ratios: list[float], seed: int) -> pd.DataFrame:
    """Return, per noise ratio, how many anomalous test images are left, and how many have a twin in training."""
    rows = {}
    for ratio in ratios:
        moved, touched = injected(index, {"ratio": ratio, "seed": seed, "overlap": False})
        left = (index["label"] == 1) & ~moved
        twins = int((left & touched).sum())
        rows[ratio * 100] = {
            "injected": int(moved.sum()),
            "left to test": int(left.sum()),
            "of them with a twin": twins,
        }
        rows[ratio * 100]["in %"] = round(100 * twins / max(1, left.sum()), 1)
    return (
        pd.DataFrame(rows)
        .T.rename_axis("anomalies / normals in %")
        .astype(dict.fromkeys(("injected", "left to test", "of them with a twin"), int))
    )


def twin_run(config: dict) -> pd.DataFrame:
    """Return metrics on the anomalous test images with a twin among the injected ones, and on those without.

    Args:
        config: as for `noise_run`, with `against`: the noise ratio whose injection tells the two groups apart, so that
            a run on the clean set is measured on the same images.

    Returns:
        Rows of `evaluate`, a set per group (`twins`) and epoch; all normal test images are in both groups.
    """
    scores, facts, test = fit_noisy(config)
    clean = dataset_features(config["dataset"], config["encoder"], config["image_size"]).index
    moved, touched = injected(clean, {**config["noise"], "ratio": config["against"]})
    twin = dict(zip(clean["path"], touched, strict=True))
    gone = set(clean.loc[moved, "path"])
    has = test.index["path"].map(twin).to_numpy(bool)
    kept = ~test.index["path"].isin(gone).to_numpy()
    normal = (test.index["label"] == 0).to_numpy()
    frames = []
    for name, members in zip(GROUPS, (has, ~has), strict=True):
        rows = np.flatnonzero(normal | (kept & members))
        part = test.index.iloc[rows].reset_index(drop=True)
        for epoch, found in scores.items():
            frame = evaluate(found.subset(rows), part, size=config["size"])
            columns = ["category", "level", "auroc", "n_normal", "n_anomalous"]
            frames.append(frame[columns].assign(twins=name, epoch=epoch))
    return pd.concat(frames, ignore_index=True).assign(**{k: v for k, v in facts.items() if not isinstance(v, list)})


def twin_changes(results: pd.DataFrame) -> pd.DataFrame:
    """Return AUROC in percent without noise and with it, and the change, per level and method: a group each.

    Args:
        results: Records of `twin_run` at ratio 0 and at one more.
    """
    rows = named(results).query("category == 'mean'")
    wide = rows.groupby(["level", "method", "twins", "noise"])["auroc"].mean().unstack("noise") * 100
    wide = wide.rename(columns="{:g} %".format).assign(change=wide.iloc[:, -1] - wide.iloc[:, 0])
    wide = wide.unstack("twins").swaplevel(axis=1)[list(GROUPS)]
    keys = pd.MultiIndex.from_product([["image", "pixel"], ORDER])
    return wide.reindex([key for key in keys if key in wide.index]).rename_axis(columns=["", "noise"]).round(1)


def twin_verdict(changes: pd.DataFrame, counts: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test whether a memory bank loses to the noise because of twins, and record it.

    Args:
        changes: `twin_changes`.
        counts: `twin_counts`, the last row of which is quoted.
        base: `profile, dataset, encoder, image_size`.
        page: name of the notebook.
    """
    change = changes.xs("change", axis=1, level=1)
    bank = change.xs("PatchCore", level=1)
    parts = [
        f"{level}: PatchCore {row[GROUPS[0]]:+.1f} where a twin was injected, {row[GROUPS[1]]:+.1f} where none was"
        for level, row in bank.iterrows()
    ]
    last = counts.iloc[-1]
    return report.claim(
        "mtd-twins",
        "On MTD a memory bank loses to noise because test defects are in training under another exposure: where they "
        "are not, it loses less than half as much.",
        bool((bank[GROUPS[1]] > bank[GROUPS[0]] / 2).all() and (bank[GROUPS[0]] < -1).all()),
        f"Change in points of AUROC, {'; '.join(parts)}. At {counts.index[-1]:g} % noise {last['in %']:.0f} % of the "
        f"anomalous test images have a twin in training ({base['dataset']}, {base['encoder']} at {base['image_size']} "
        "px).",
        source="this book, on the protocol of FUN-AD's supplementary Table 1",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )
