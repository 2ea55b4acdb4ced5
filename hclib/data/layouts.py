"""One function per published folder layout: a folder in, rows of the index frame out.

A row is `(path, mask_path, category, split, defect)`; `hclib.data.datasets` sorts, checks and labels the
rows. Nothing is opened here but the lists that a data set ships (CSV, JSON).
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from hclib.images import IMAGE_SUFFIXES

COLUMNS = ("path", "mask_path", "category", "split", "label", "defect")
Row = tuple[str, str, str, str, str]

MVTEC = (
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw"),
    *("tile", "toothbrush", "transistor", "wood", "zipper"),
)
MPDD = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")
BTAD = ("01", "02", "03")
MTD_DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")


class DatasetError(ValueError):
    """A data set that is there but cannot be used; the message names the file or row and what to do."""


def mvtec(root: Path) -> list[Row]:
    """List MVTec AD: `<category>/train/good`, `test/<defect>`, `ground_truth/<defect>/NNN_mask.png`."""
    return _published(root, MVTEC)


def mpdd(root: Path) -> list[Row]:
    """List MPDD, which follows MVTec AD's layout."""
    return _published(root, MPDD)


def btad(root: Path) -> list[Row]:
    """List BTAD: as MVTec AD with folders `ok` and `ko`; images are .bmp or .png, masks .png or .bmp (03)."""
    return _published(root, BTAD, good="ok")


def visa(root: Path) -> list[Row]:
    """List VisA by its official split, `split_csv/1cls.csv`; the only defect that it names is "anomaly"."""
    source = root / "split_csv" / "1cls.csv"
    table = _read_csv(source, ("object", "split", "label", "image", "mask"))
    rows = [
        (
            (root / image).as_posix(),
            (root / mask).as_posix() if mask else "",
            category,
            split,
            "good" if label == "normal" else label,
        )
        for category, split, label, image, mask in table.itertuples(index=False)
    ]
    _require_files(rows, source)
    return rows


def realiad(root: Path) -> list[Row]:
    """List Real-IAD by its JSON splits, with the images of `realiad_1024` (or else `_512`, `_256`, `_raw`).

    The splits are `realiad_jsons/<category>.json`, one folder deeper in some copies: `meta.prefix`,
    `meta.normal_class` and the lists `train` and `test` of `{category, anomaly_class, image_path,
    mask_path}`.
    """
    splits = root / "realiad_jsons"
    splits = splits / "realiad_jsons" if (splits / "realiad_jsons").is_dir() else splits
    pictures = [root / f"realiad_{size}" for size in ("1024", "512", "256", "raw")]
    found = next((folder for folder in pictures if folder.is_dir()), None)
    if found is None:
        raise DatasetError(
            f"{root}: no {', '.join(p.name for p in pictures)}; unpack the images beside the JSON splits"
        )
    rows = []
    for source in sorted(splits.glob("*.json")):
        try:
            content = json.loads(source.read_text())
            folder, normal = found / content["meta"]["prefix"], content["meta"].get("normal_class", "OK")
            part = [
                (
                    (folder / item["image_path"]).as_posix(),
                    (folder / item["mask_path"]).as_posix() if item.get("mask_path") else "",
                    item.get("category") or source.stem,
                    split,
                    "good" if item["anomaly_class"] == normal else item["anomaly_class"],
                )
                for split in ("train", "test")
                for item in content[split]
            ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DatasetError(f"{source}: not a Real-IAD split ({error!r}); unpack realiad_jsons again") from error
        _require_files(part, source)
        rows += part
    return rows


def mtd(root: Path, seed: int = 0) -> list[Row]:
    """List Magnetic Tile Defects, upstream tree: `MT_<Type>/Imgs/*.jpg` with the mask beside it as `.png`.

    The set has no split of its own: all defects are test images, and so is a fifth, rounded up, of the normal
    ones (`MT_Free`), 191 of 952. They are drawn by `random.Random(seed).sample` from the sorted names; seed 0
    gives the split of the realmix benchmark.
    """
    normal = [path for path in _images(root / "MT_Free" / "Imgs") if path.suffix.lower() != ".png"]
    names = sorted(path.name for path in normal)
    test = set(random.Random(seed).sample(names, -(-len(names) // 5)))
    rows = [(path.as_posix(), "", "magnetic_tile", "test" if path.name in test else "train", "good") for path in normal]
    for kind in MTD_DEFECTS:
        files = _images(root / f"MT_{kind}" / "Imgs")
        masks = {path.stem: path for path in files if path.suffix.lower() == ".png"}
        for path in files:
            if path.suffix.lower() != ".png":
                if path.stem not in masks:
                    raise _no_mask(path, path.with_suffix(".png"))
                rows.append((path.as_posix(), masks[path.stem].as_posix(), "magnetic_tile", "test", kind.lower()))
    return rows


def folder(root: Path) -> list[Row]:
    """List a directory in MVTec AD's layout: many categories, or one with `train` and `test` directly in it.

    Images directly in `train` count as good. A category without a `ground_truth` folder has no masks; where
    it has one, every anomalous test image needs its mask, as `NAME_mask` or `NAME` with any image suffix.
    """
    if (root / "train").is_dir() or (root / "test").is_dir():
        return _category(root, root.name, "good", need_masks=False)
    rows = []
    for sub in _folders(root):
        if (sub / "train").is_dir() or (sub / "test").is_dir():
            rows += _category(sub, sub.name, "good", need_masks=False)
        elif not any(sub.iterdir()):
            raise DatasetError(
                f"{sub}: the category is empty; fill it (train/good, test/<defect>) or remove the folder"
            )
    return rows


def listed(source: Path, base: Path | None = None) -> list[Row]:
    """List a CSV file with the index columns; relative paths start from `base`, or else from its folder."""
    table = _read_csv(source, COLUMNS)
    base = (base or source.parent).absolute()
    for line, (split, label, defect) in enumerate(zip(table["split"], table["label"], table["defect"], strict=True), 2):
        if split not in ("train", "test") or label not in ("0", "1") or (label == "0") != (defect == "good"):
            raise DatasetError(
                f"{source}, line {line}: split {split!r}, label {label!r}, defect {defect!r}; split is train "
                'or test, label 0 or 1, and defect "good" exactly where the label is 0'
            )
    rows = [
        (_absolute(base, path), _absolute(base, mask) if mask else "", category, split, defect)
        for path, mask, category, split, _, defect in table.itertuples(index=False)
    ]
    _require_files(rows, source)
    return rows


def _published(root: Path, categories: Iterable[str], good: str = "good") -> list[Row]:
    return [row for name in categories if (root / name).is_dir() for row in _category(root / name, name, good, True)]


def _category(root: Path, name: str, good: str, need_masks: bool) -> list[Row]:
    """List one category: images by split and defect, each anomalous one with its mask."""
    rows = [(path.as_posix(), "", name, "train", "good") for path in _images(root / "train")]
    if loose := _images(root / "test"):
        raise DatasetError(f"{loose[0]}: a test image outside a defect folder; move it to test/{good} or test/<defect>")
    masked = need_masks or (root / "ground_truth").is_dir()
    for split in ("train", "test"):
        for sub in _folders(root / split):
            normal = sub.name == good
            masks = {} if normal else {path.stem: path for path in _images(root / "ground_truth" / sub.name)}
            for path in _images(sub):
                mask = masks.get(f"{path.stem}_mask") or masks.get(path.stem)
                if mask is None and masked and not normal and split == "test":
                    raise _no_mask(path, root / "ground_truth" / sub.name / f"{path.stem}_mask.png")
                defect = "good" if normal else sub.name
                rows.append((path.as_posix(), mask.as_posix() if mask else "", name, split, defect))
    if not rows:
        raise DatasetError(f"{root}: the category is empty; images belong into train/{good} and test/<defect>")
    return rows


def _folders(root: Path) -> list[Path]:
    """Return the visible sub-folders of `root`, sorted; none where it is no folder."""
    if not root.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")


def _images(root: Path) -> list[Path]:
    """Return the visible image files directly in `root`, sorted; none where it is no folder."""
    if not root.is_dir():
        return []
    return sorted(
        Path(entry.path)
        for entry in os.scandir(root)
        if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != "." and entry.is_file()
    )


def _read_csv(source: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read the named columns of a CSV file as text, empty fields as ""."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; give the path of a CSV with columns {', '.join(columns)}")
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' parser errors are ValueErrors
        raise DatasetError(f"{source}: cannot be read as CSV ({error}); save it as comma-separated UTF-8") from error
    if missing := [column for column in columns if column not in table]:
        raise DatasetError(f"{source}: no column {', '.join(missing)}; the columns needed are {', '.join(columns)}")
    return table[list(columns)]


def _absolute(base: Path, path: str) -> str:
    return (base / path).as_posix()


def _require_files(rows: Sequence[Row], source: Path) -> None:
    """Raise when a listed file is absent."""
    for image, mask, *_ in rows:
        for path in (image, mask):
            if path and not os.path.isfile(path):
                raise DatasetError(
                    f"{path}: no such file, although {source} lists it; complete the data set or the list"
                )


def _no_mask(image: Path, expected: Path) -> DatasetError:
    return DatasetError(f"{image}: this anomalous image has no mask; expected {expected}")
