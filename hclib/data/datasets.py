"""The data sets by name: every layout becomes one index frame.

An index frame has one row per image and the columns `path, mask_path, category, split, label, defect`:
absolute POSIX paths ("" where there is no mask), split "train" or "test", label 0 (normal) or 1 (anomalous),
defect "good" for normal images. Its rows are sorted by category, split (train first), defect ("good" first)
and path, and `index.attrs["name"]` is the data set's name. Nothing else describes a data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hclib.data import layouts
from hclib.data.layouts import COLUMNS, DatasetError
from hclib.images import ImageError, image_shape, read_image, read_mask
from hclib.paths import cache_dir, data_roots, published_dir


@dataclass(frozen=True)
class Source:
    """What the registry knows of a data set: how to recognise and list its folder, where it comes from."""

    description: str
    layout: Callable[[Path], list[layouts.Row]]
    folders: tuple[str, ...]  # names that copies of it go by, below a data root
    marker: tuple[str, ...]  # patterns of paths, one of which exists in it
    home: str
    table: str | None = None  # its name in HierCore's Table 2


SOURCES = {
    "mtd": Source(
        "Magnetic Tile Defects: 952 normal and 392 defective images with masks; normals split 761/191",
        layouts.mtd,
        ("mtd", "Magnetic-tile-defect-datasets."),
        ("MT_Free/Imgs",),
        "https://github.com/abin24/Magnetic-tile-defect-datasets.",
    ),
    "realmix": Source(
        "a real multi-class benchmark of six small public sets: 1,486 train and 1,194 test images with masks",
        lambda root: layouts.listed(root / "realmix.csv"),
        (".", "realmix"),
        ("realmix.csv",),
        "six public repositories, see hclib.data.download",
    ),
    "mvtec": Source(
        "MVTec AD: 15 categories",
        layouts.mvtec,
        ("mvtec", "mvtec_ad", "mvtec_anomaly_detection", "MVTec"),
        tuple(f"{name}/train/good" for name in layouts.MVTEC),
        "https://www.mvtec.com/company/research/datasets/mvtec-ad",
        "MVTec AD",
    ),
    "visa": Source(
        "VisA: 12 categories, official one-class split",
        layouts.visa,
        ("visa", "VisA", "VisA_20220922"),
        ("split_csv/1cls.csv",),
        "https://github.com/amazon-science/spot-diff",
        "VisA",
    ),
    "mpdd": Source(
        "MPDD: 6 categories of metal parts",
        layouts.mpdd,
        ("mpdd", "MPDD"),
        tuple(f"{name}/train/good" for name in layouts.MPDD),
        "https://github.com/stepanje/MPDD",
        "MPDD",
    ),
    "btad": Source(
        "BTAD: 3 categories",
        layouts.btad,
        ("btad", "BTAD", "BTech_Dataset_transformed"),
        tuple(f"{name}/train/ok" for name in layouts.BTAD),
        "https://avires.dimi.uniud.it/papers/btad/btad.zip",
        "BTAD",
    ),
    "realiad": Source(
        "Real-IAD: 30 categories, JSON splits",
        layouts.realiad,
        ("realiad", "Real-IAD", "RealIAD"),
        ("realiad_jsons/*.json", "realiad_jsons/realiad_jsons/*.json"),
        "https://realiad4ad.github.io/Real-IAD/",
    ),
}
"""The data sets that lie in a folder; `demo`, `folder` and CSV files are handled by `load_index` itself."""

PUBLISHABLE = {"demo": None, "realmix": ("ball_screw", "cookie", "hazelnut_toy")}
"""Data sets whose licence allows their pixels on a page; None stands for every category."""

_UPSTREAM = {  # category -> train normal, test normal, test abnormal, kinds of defect, of the upstream trees
    "mtd": {"magnetic_tile": (761, 191, 392, 5)},
    "realmix": {
        "ball_screw": (256, 177, 167, 1),
        "cookie": (31, 14, 32, 1),
        "glassfiber": (90, 18, 20, 1),
        "hazelnut_toy": (28, 6, 17, 1),
        "magnetic_tile": (761, 191, 392, 5),
        "screw": (320, 41, 119, 5),
    },
}
_COUNTS = ("train_normal_count", "test_normal_count", "test_abnormal_count", "anomaly_class_count")


def load_index(
    name: str,
    root: str | Path | None = None,
    *,
    categories: Sequence[str] | None = None,
    seed: int = 0,
    allow_contaminated: bool = False,
) -> pd.DataFrame:
    """List a data set as an index frame; no image is opened.

    Args:
        name: a name of `list_datasets()`; "folder" with `root`, or the path of a directory in MVTec AD's
            layout; or the path of a CSV file with the index columns.
        root: the data set's folder or one that holds it; by default `$HCLIB_DATA` and the cache are searched.
            For a CSV file, the folder that its relative paths start from; for demo, the folder to render
            into.
        categories: which categories to keep; all by default.
        seed: of the split of mtd, and of the images of demo; no other set depends on it.
        allow_contaminated: accept anomalous images in `train`.

    Returns:
        An index frame (columns, order and dtypes as this module says) with a RangeIndex; `attrs["name"]` is
        `name`, "folder" for a directory, the file's name for a CSV file.

    Raises:
        FileNotFoundError: when the data set is not found; the message names the folders searched and a
            command.
        DatasetError: for an unknown name or category, an empty category, a listed file or a mask that is
            missing, duplicate rows, and anomalous training images that are not allowed.
    """
    if name in SOURCES:
        folder = locate(name, root)
        rows = layouts.mtd(folder, seed) if name == "mtd" else SOURCES[name].layout(folder)
    elif name == "demo":
        from hclib.data.demo import render_demo

        folder = render_demo(root, seed)
        rows = layouts.listed(folder / "index.csv")
    elif str(name).endswith(".csv"):
        folder, name = Path(name), Path(name).name
        rows = layouts.listed(folder, Path(root) if root else None)
    elif name == "folder" or Path(name).is_dir():
        if name == "folder" and not root:
            raise DatasetError('"folder" needs root=, a directory in MVTec AD\'s layout')
        folder = Path(root if name == "folder" else name).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; pass a directory in MVTec AD's layout")
        name, rows = "folder", layouts.folder(folder)
    else:
        raise DatasetError(
            f"{name!r} is no data set, folder or CSV file; the names are demo, {', '.join(SOURCES)}, folder"
        )
    return _index_frame(rows, name, folder, categories, allow_contaminated)


def list_datasets() -> pd.DataFrame:
    """List the data sets: `name, description, where` they are or come from, `found` (bool) on this disk."""
    rows = [("demo", "six rendered categories with masks, drawn in the cache on first use", "rendered", True)]
    for name, source in SOURCES.items():
        folder = _search(name, None)
        rows.append((name, source.description, str(folder or source.home), folder is not None))
    rows.append(("folder", "any directory in MVTec AD's layout, or a CSV file with the index columns", "", True))
    return pd.DataFrame(rows, columns=["name", "description", "where", "found"])


def locate(name: str, root: str | Path | None = None) -> Path:
    """Return the folder of a data set of `SOURCES`, below `root` or below the data roots.

    Raises:
        FileNotFoundError: when it is not there; the message names the folders searched and a command.
    """
    folder = _search(name, root)
    if folder is None:
        searched = ", ".join(str(base) for base in _bases(root))
        names = " or ".join(alias for alias in SOURCES[name].folders if alias != ".")
        raise FileNotFoundError(
            f"data set {name!r} is not in {searched} (looked for {names}, with {SOURCES[name].marker[0]} in "
            f"it); set HCLIB_DATA to the folder that holds it, or run `hclib data get {name}`"
        )
    return folder


def check(name: str, root: str | Path | None = None) -> pd.DataFrame:
    """Compare a data set's image counts with the published ones.

    The counts are those of HierCore's Table 2 for mvtec, visa, mpdd and btad, and those of the upstream trees
    for mtd and realmix. VisA's split names no kinds of defect, so these are not compared there.

    Returns:
        One row per category and count: `category, count, published, found, problem`, the last "" where they
        agree.

    Raises:
        DatasetError: when nothing is published to compare with; whatever `load_index` raises.
    """
    published = published_counts(name)
    index = load_index(name, root, allow_contaminated=True)
    normal, train = index["label"] == 0, index["split"] == "train"
    parts = (index[normal & train], index[normal & ~train], index[~normal & ~train], index[~normal])
    found = pd.concat([part.groupby("category").size() for part in parts[:3]], axis=1)
    found[3] = parts[3].groupby("category")["defect"].nunique()
    found = found.reindex(sorted({*published.index, *found.index})).fillna(0).astype(int)
    found.columns = _COUNTS
    rows = []
    for category, counts in found.iterrows():
        for count in _COUNTS[: 3 if name == "visa" else 4]:
            expected = int(published[count].get(category, 0))
            difference = counts[count] - expected
            problem = "" if not difference else f"{abs(difference)} too {'many' if difference > 0 else 'few'}"
            rows.append((category, count.removesuffix("_count"), expected, int(counts[count]), problem))
    extra = (index["label"] == 1) & train
    for category, bad in index[extra].groupby("category").size().items():
        rows.append((category, "train_abnormal", 0, int(bad), f"{bad} too many"))
    return pd.DataFrame(rows, columns=["category", "count", "published", "found", "problem"])


def published_counts(name: str) -> pd.DataFrame:
    """Return a data set's published image counts: a row per category, columns as in HierCore's Table 2.

    Raises:
        DatasetError: when no counts are known for `name`.
    """
    if name in _UPSTREAM:
        return pd.DataFrame.from_dict(_UPSTREAM[name], orient="index", columns=list(_COUNTS))
    if name not in SOURCES or SOURCES[name].table is None:
        known = [known for known, source in SOURCES.items() if source.table] + list(_UPSTREAM)
        raise DatasetError(f"no published image counts for {name!r}; there are some for {', '.join(known)}")
    table = pd.read_csv(published_dir() / "hiercore_table2.csv", dtype={"class": str})
    table = table[(table["dataset"] == SOURCES[name].table) & (table["class"] != "total")]
    return table.pivot(index="class", columns="metric", values="value")[list(_COUNTS)].astype(int)


def may_publish(index: pd.DataFrame) -> np.ndarray:
    """Say for every row whether the image may be shown in the book, `(N,)` bool.

    Allowed are the rendered demo set and the three parts of realmix whose licences permit republication with
    attribution. Everything else, a set of unknown name included, is not.
    """
    if (name := index.attrs.get("name")) not in PUBLISHABLE:
        return np.zeros(len(index), bool)
    allowed = PUBLISHABLE[name]
    return np.ones(len(index), bool) if allowed is None else index["category"].isin(allowed).to_numpy()


def audit(index: pd.DataFrame, *, quick: bool = False) -> pd.DataFrame:
    """Open every file of an index and list what is wrong.

    Looked for: images and masks that cannot be read, masks of another size than their image, anomalous test
    images without a mask or with an empty one, anomalous training images, and files of equal content: twice
    in one part, in training and test, or normal here and anomalous there.

    Args:
        index: an index frame.
        quick: only look for images that cannot be read.

    Returns:
        One row per problem: `path, category, problem`; empty when there is none.
    """
    from tqdm.auto import tqdm

    problems, first = [], {}
    for row in tqdm(index.itertuples(index=False), total=len(index), desc="audit", disable=None):
        found = _image_problem(row.path)
        if not quick:
            found = found or _mask_problem(row)
            if row.split == "train" and row.label == 1:
                problems.append((row.path, row.category, f"anomalous ({row.defect}) in train"))
            if Path(row.path).is_file():
                twin = first.setdefault(hashlib.sha256(Path(row.path).read_bytes()).digest(), row)
                if twin is not row:
                    problems.append((row.path, row.category, _twins(row, twin)))
        if found:
            problems.append((row.path, row.category, found))
    return pd.DataFrame(problems, columns=["path", "category", "problem"])


def _image_problem(path: str) -> str:
    try:
        read_image(path)
    except ImageError as error:
        return str(error)
    return ""


def _mask_problem(row: tuple) -> str:
    if not row.mask_path:
        return "anomalous, without a mask" if row.label and row.split == "test" else ""
    try:
        mask = read_mask(row.mask_path, image_shape(row.path))
    except ImageError as error:
        return str(error)
    return f"the mask {row.mask_path} is empty" if row.label and not mask.any() else ""


def _twins(row: tuple, twin: tuple) -> str:
    kinds = "normal and anomalous" if row.label != twin.label else ""
    places = f"both in {row.split}" if row.split == twin.split else "in train and test"
    return f"same content as {twin.path}, {places}{', ' if kinds else ''}{kinds}"


def _bases(root: str | Path | None) -> list[Path]:
    return [Path(root)] if root else [*data_roots(), cache_dir() / "data"]


def _search(name: str, root: str | Path | None) -> Path | None:
    source = SOURCES[name]
    for base in _bases(root):
        for candidate in ([base] if root else []) + [base / alias for alias in source.folders]:
            if any(next(candidate.glob(pattern), None) for pattern in source.marker):
                return candidate.absolute()
    return None


def _index_frame(
    rows: list[layouts.Row],
    name: str,
    folder: Path,
    categories: Sequence[str] | None,
    allow_contaminated: bool,
) -> pd.DataFrame:
    """Sort, select, label and check the rows of a layout."""
    index = pd.DataFrame(rows, columns=[column for column in COLUMNS if column != "label"])
    if index.empty:
        raise DatasetError(f"{folder}: no image found; see `load_index` for the layouts that are understood")
    if categories is not None:
        present = sorted(set(index["category"]))
        if absent := sorted(set(categories) - set(present)):
            raise DatasetError(f"{folder}: no category {', '.join(absent)}; there are {', '.join(present)}")
        index = index[index["category"].isin(categories)]
    index.insert(4, "label", (index["defect"] != "good").astype("int64"))
    keys = ["category", "split", "label", "defect", "path"]
    index = index.sort_values(keys, ascending=[True, False, True, True, True]).reset_index(drop=True)
    if (twice := index["path"].duplicated()).any():
        raise DatasetError(
            f"{index['path'][twice].iloc[0]}: listed more than once ({twice.sum()} such rows in {folder}); "
            "an image belongs to one row"
        )
    if name in SOURCES:
        for category, splits in index.groupby("category")["split"].unique().items():
            if absent := {"train", "test"} - set(splits):
                raise DatasetError(f"{folder}: no {absent.pop()} images of {category}; complete the copy")
        unmasked = index[(index["split"] == "test") & (index["label"] == 1) & (index["mask_path"] == "")]
        if len(unmasked):
            raise DatasetError(f"{unmasked['path'].iloc[0]}: this anomalous image has no mask; complete the copy")
    leaked = index[(index["split"] == "train") & (index["label"] == 1)]
    if len(leaked) and not allow_contaminated:
        raise DatasetError(
            f"{leaked['path'].iloc[0]}: an anomalous image in train ({len(leaked)} of them); move them to "
            "test, or pass allow_contaminated=True to study a contaminated training set"
        )
    index.attrs["name"] = name
    return index
