"""Contaminated training sets: anomalous test images moved or copied into training, by an explicit rule.

Papers write "10 % noise" and mean different things. Here a noise specification is five values: the ratio, what it is a
ratio *of* (`definition`), whether injected images stay in the test set (`overlap`), the largest share of a category's
anomalies that may go (`cap`), and the seed. What was moved is a manifest: a frame, and a CSV that can be loaded back.

| protocol | call |
|---|---|
| MeDS, FUN-AD "overlap" | `contaminate(index, 0.1)` |
| FUN-AD "no overlap", SoftPatch (which stops where anomalies run out) | `contaminate(index, 0.1, overlap=False)` |
| open-iad: at most 75 % of the test anomalies | `contaminate(index, 0.1, overlap=False, cap=0.75)` |
| MeDS, section 3.1: anomalies / all | `contaminate(index, 0.1, definition="of_total")` |
| InReaCh: a number of images (its program draws normal ones too) | `contaminate(index, 40, definition="count")` |
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from hclib.data.layouts import DatasetError

DEFINITIONS = ("per_normal", "of_total", "count")
SPEC = ["definition", "ratio", "overlap", "cap", "seed"]
COUNTS = ["normals", "available", "asked", "moved", "realised_ratio"]
MANIFEST = ["category", "defect", "path", *SPEC, *COUNTS]
_KEYS = ["category", "split", "label", "defect", "path"]


def contaminate(
    index: pd.DataFrame,
    ratio: float,
    seed: int = 0,
    overlap: bool = True,
    definition: str = "per_normal",
    *,
    cap: float = 1.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put anomalous test images into the training set of every category.

    The anomalies of a category are brought into a seeded order in which every beginning holds the kinds of defect in
    their proportions (to about one image each); the first ones go. So the images of a small ratio are among those of
    a larger one with the same seed, and a category's images do not depend on which other categories there are.

    Args:
        index: index frame whose training images are all normal.
        ratio: how much, in the sense of `definition`; counts are rounded to the nearest image.
        seed: of the order.
        overlap: True leaves injected images in the test set too; False removes them from it.
        definition: "per_normal", anomalies / normal training images; "of_total", anomalies / all training images of
            the result; "count", images per category.
        cap: largest share of a category's anomalous test images that may be injected. Where anomalies run out,
            all that may be are, and the manifest says what ratio was realised.

    Returns:
        The contaminated index frame (injected rows have split "train" and keep their label and mask), in the order of
        index frames, and the manifest: one row per injected image with `category, defect, path`, the five values of
        the specification, and the counts of its category `normals, available, asked, moved, realised_ratio` (in the
        definition's own terms). A category into which nothing was injected has one row with an empty path.

    Raises:
        DatasetError: a ratio, definition or cap out of range; training images that are anomalous already; a category
            without normal training images.
    """
    _check(index, ratio, definition, cap)
    rows, picked = [], []
    for category, members in index.groupby("category", sort=True):
        normals = int((members["split"] == "train").sum())
        pool = members[(members["split"] == "test") & (members["label"] == 1)].sort_values(["defect", "path"])
        asked = _asked(ratio, normals, definition)
        moved = min(asked, math.floor(cap * len(pool) + 1e-9))
        chosen = pool.iloc[_stratified_order(pool["defect"], seed, category)[:moved]]
        picked.append(chosen)
        counts = [normals, len(pool), asked, moved, realised_ratio(normals, moved, definition)]
        spec = [definition, ratio, overlap, cap, seed]
        names = list(zip(chosen["defect"], chosen["path"], strict=True)) or [("", "")]
        rows += [[category, defect, path, *spec, *counts] for defect, path in sorted(names)]
    return _inject(index, pd.concat(picked), overlap), pd.DataFrame(rows, columns=MANIFEST)


def realised_ratio(normals: int, moved: int, definition: str) -> float:
    """Return the ratio that `moved` anomalies among `normals` normal training images are, under a definition."""
    if definition == "count":
        return float(moved)
    total = normals + moved if definition == "of_total" else normals
    return moved / total if total else math.nan


def realised(manifest: pd.DataFrame) -> pd.DataFrame:
    """Summarise a manifest: a row per category and one for "all".

    Returns:
        `normals, available, asked, moved`, and what came of it in both readings, `per_normal` and `of_total`.
    """
    table = manifest.groupby("category")[["normals", "available", "asked", "moved"]].first()
    table.loc["all"] = table.sum(min_count=len(table))
    table["per_normal"] = table["moved"] / table["normals"]
    table["of_total"] = table["moved"] / (table["normals"] + table["moved"])
    return table


def apply_manifest(index: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """Inject the images that a manifest names, from this or another machine.

    A path of the manifest is found in the index by its last parts; where that fails (MeDS lists VisA in a converted
    layout), by category and file name among the category's anomalous test images.

    Returns:
        The contaminated index frame, as `contaminate` gives it.

    Raises:
        DatasetError: a path that no anomalous test image of the index has, or several have; training images that are
            anomalous already.
    """
    _check(index, 0, "per_normal", 1.0)
    pool = index[(index["split"] == "test") & (index["label"] == 1)]
    moved = manifest[manifest["path"] != ""]
    rows = [_find(pool, category, path) for category, path in zip(moved["category"], moved["path"], strict=True)]
    if len(set(rows)) < len(rows):
        raise DatasetError("two rows of the manifest name the same image of the index; it lists some image twice")
    return _inject(index, pool.loc[rows], bool(manifest["overlap"].iloc[0]))


def save_manifest(manifest: pd.DataFrame, file: str | Path, root: str | Path | None = None) -> None:
    """Write a manifest as CSV, its paths relative to `root`, by default to the folder that all its images share.

    Raises:
        DatasetError: an image that lies outside `root`.
    """
    paths = [PurePosixPath(path) for path in manifest["path"] if path]
    base = PurePosixPath(Path(root).absolute().as_posix()) if root else _shared_folder(paths)
    outside = [path for path in paths if not path.is_relative_to(base)] if root else []
    if outside:
        raise DatasetError(f"{outside[0]} is not below {base}: give the folder that holds the data set as root")
    short = [PurePosixPath(path).relative_to(base).as_posix() if path else "" for path in manifest["path"]]
    manifest.assign(path=short).to_csv(file, index=False, lineterminator="\n")


def load_manifest(file: str | Path, root: str | Path | None = None) -> pd.DataFrame:
    """Read a manifest that `save_manifest` wrote, or one of the lists that MeDS's authors publish.

    Args:
        file: the CSV. A published list has the columns `filename, clsname` (VisA: `filename, class`), names every
            training image, and states its nominal ratio (anomalies / normals) and seed in its name,
            `train_mvtec_nr10_seed_0.csv`; how many anomalies were available it does not say (NaN).
        root: folder that the paths are joined to; by default they stay relative.

    Raises:
        DatasetError: other columns than those of either kind; a published list whose name does not state its ratio.
    """
    frame = pd.read_csv(file, keep_default_na=False, na_values={"available": [""]}, dtype={"category": str})
    if "filename" in frame.columns:
        frame = _published(frame, Path(file))
    if list(frame.columns) != MANIFEST:
        raise DatasetError(f"{file}: columns {list(frame.columns)}; a manifest has {MANIFEST}")
    if root is not None:
        base = Path(root).absolute().as_posix()
        frame["path"] = [f"{base}/{path}" if path else "" for path in frame["path"]]
    return frame


def _check(index: pd.DataFrame, ratio: float, definition: str, cap: float) -> None:
    if definition not in DEFINITIONS:
        raise DatasetError(f"definition {definition!r}: choose one of {', '.join(DEFINITIONS)}")
    if not 0 <= ratio < math.inf or (definition == "of_total" and ratio >= 1):
        limit = "[0, 1): 1 would leave no normal image" if definition == "of_total" else "0 or more"
        raise DatasetError(f"ratio {ratio} under {definition!r}: must be {limit}; write 10 % as 0.1")
    if definition == "count" and ratio != int(ratio):
        raise DatasetError(f'ratio {ratio} under "count": give a whole number of images per category')
    if not 0 <= cap <= 1:
        raise DatasetError(f"cap {cap}: the share of a category's anomalies that may be injected lies in [0, 1]")
    train = index["split"] == "train"
    if (index.loc[train, "label"] == 1).any():
        first = index.loc[train & (index["label"] == 1), "path"].iloc[0]
        raise DatasetError(f"{first}: anomalous in train already; contaminate a clean index")
    if lacking := sorted(set(index["category"]) - set(index.loc[train, "category"])):
        raise DatasetError(f"category {lacking[0]} has no normal training image: there is nothing to contaminate")


def _asked(ratio: float, normals: int, definition: str) -> int:
    """Return the number of anomalies asked for; rounded as in MeDS's published lists."""
    if definition == "count":
        return int(ratio)
    return round(normals * (ratio if definition == "per_normal" else ratio / (1 - ratio)))


def _stratified_order(kinds: pd.Series, seed: int, category: str) -> np.ndarray:
    """Return positions (n,) in a seeded order whose beginnings hold every kind in proportion."""
    generator = np.random.default_rng([seed, *category.encode()])
    kinds, key = kinds.to_numpy(), np.empty(len(kinds))
    for kind in sorted(set(kinds)):
        rows = np.flatnonzero(kinds == kind)
        key[generator.permutation(rows)] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(key, kind="stable")


def _inject(index: pd.DataFrame, chosen: pd.DataFrame, overlap: bool) -> pd.DataFrame:
    kept = index if overlap else index.drop(chosen.index)
    result = pd.concat([kept, chosen.assign(split="train")])
    result = result.sort_values(_KEYS, ascending=[True, False, True, True, True]).reset_index(drop=True)
    result.attrs = dict(index.attrs)
    return result


def _find(pool: pd.DataFrame, category: str, path: str) -> int:
    """Return the row label of the one anomalous test image that a manifest's path means."""
    members = pool[pool["category"] == category]
    ends = members["path"].map(lambda p: p == path or p.endswith("/" + path))
    if not ends.any():
        ends = members["path"].map(lambda p: PurePosixPath(p).name) == PurePosixPath(path).name
    if ends.sum() != 1:
        raise DatasetError(
            f"{path} ({category}): {ends.sum()} anomalous test images of the index fit; exactly one is needed. "
            "Is it the manifest of another data set, or is the index contaminated already?"
        )
    return members.index[ends][0]


def _shared_folder(paths: Sequence[PurePosixPath]) -> PurePosixPath:
    if not paths:
        return PurePosixPath(".")
    parts = [path.parent.parts for path in paths]
    same = 0
    while all(len(part) > same and part[same] == parts[0][same] for part in parts):
        same += 1
    return PurePosixPath(*parts[0][: max(1, same - 2)])  # two shared folders stay, so that paths tell what they are


def _published(frame: pd.DataFrame, file: Path) -> pd.DataFrame:
    named = re.search(r"nr(\d+)_seed_(\d+)", file.stem)
    if not named or frame.shape[1] != 2:
        raise DatasetError(f"{file}: a published list has two columns and a name such as train_mvtec_nr10_seed_0.csv")
    ratio, seed = int(named[1]) / 100, int(named[2])
    frame = frame.set_axis(["path", "category"], axis=1)
    frame["defect"] = [PurePosixPath(path).parts[-2] for path in frame["path"]]
    rows = []
    for category, members in frame.groupby("category", sort=True):
        injected = members[members["defect"] != "good"].sort_values(["defect", "path"])
        normals, moved = len(members) - len(injected), len(injected)
        counts = [normals, math.nan, round(ratio * normals), moved, realised_ratio(normals, moved, "per_normal")]
        names = list(zip(injected["defect"], injected["path"], strict=True)) or [("", "")]
        rows += [[category, defect, path, "per_normal", ratio, True, 1.0, seed, *counts] for defect, path in names]
    return pd.DataFrame(rows, columns=MANIFEST)
