"""How the realmix benchmark is made from five public repositories (its sixth part, MTD, is used as it is).

Images are made smaller by the sizes and JPEG qualities below, masks by Pillow's box filter (white from 128).
The filter of the images is known to be Lanczos for screw and taken to be so for ball_screw, cookie and
glassfiber; hazelnut_toy is copied. Images made here have the names of those behind the committed Records but
were not compared with them byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hclib.data.layouts import DatasetError
from hclib.images import read_image, read_mask


@dataclass(frozen=True)
class Part:
    """One category: its repository, and how its images are made smaller (size None: copied as they are)."""

    repository: str
    commit: str
    terms: str
    size: tuple[int, int] | None = None  # width, height
    quality: int = 95
    grey: bool = False


@dataclass(frozen=True)
class Entry:
    """One image of the benchmark: where it belongs, and what it is made from; names are without suffix."""

    folder: str  # <category>/<split>/<defect>
    name: str
    images: str  # upstream folder, as a pattern
    image: str  # its upstream name
    masks: str  # upstream folder of masks, "" where there is none


PARTS = {
    "ball_screw": Part("2Obe/BSData", "7204b28", "CC BY-SA 4.0", (640, 261), quality=88),
    "cookie": Part("aws-samples/amazon-lookout-for-vision", "14bed61", "CC BY-SA 4.0", (384, 512)),
    "glassfiber": Part("idinyte/SimpleNet_SDU", "fe0b8ea", "no licence stated", (512, 512), grey=True),
    "hazelnut_toy": Part("sungchul2/training_extensions", "a616ce9", "Apache-2.0"),
    "screw": Part("dungdao1995/SkipGanomaly-MVTECAD", "4bb4ee6", "CC BY-NC-SA 4.0", (512, 512), grey=True),
}


@cache
def entries(category: str) -> tuple[Entry, ...]:
    """Return the images of a category of `PARTS`, as `realmix.txt` lists them."""
    here, listed = None, []
    for line in Path(__file__).with_name("realmix.txt").read_text().splitlines():
        if not line.startswith((" ", "#")):
            here = [part.strip() for part in line.split("<")] + [""]
        elif here and here[0].startswith(f"{category}/"):
            for name, _, other in (entry.partition("=") for entry in line.split()):
                listed.append(Entry(here[0], name, here[1], other or name, here[2]))
    return tuple(listed)


def is_source(category: str, path: str) -> bool:
    """Say whether a file inside the category's repository may be one that the benchmark is made from."""
    folder = os.path.dirname(path)
    return any(fnmatch(folder, pattern) for pattern in _patterns(category))


def convert(category: str, raw: Path, made: Path) -> None:
    """Write a category in MVTec AD's layout into `made`, from the files of its repository in `raw`.

    Raises:
        DatasetError: when a file that the benchmark is made from is missing upstream, or is there twice.
        ImageError: when one cannot be read.
    """
    part = PARTS[category]
    found: dict[str, dict[str, list[Path]]] = {pattern: {} for pattern in _patterns(category)}
    for path in sorted(path for path in raw.rglob("*") if path.is_file()):
        for pattern, files in found.items():
            if fnmatch(path.parent.relative_to(raw).as_posix(), pattern):
                files.setdefault(path.stem, []).append(path)
    for entry in entries(category):
        _, split, defect = entry.folder.split("/")
        image = made / split / defect / f"{entry.name}.jpg"
        _write_image(_only(found, entry.images, entry.image), image, part)
        if entry.masks:
            name = f"{entry.name}_mask" if f"{entry.name}_mask" in found[entry.masks] else entry.name
            mask = made / "ground_truth" / defect / f"{entry.name}_mask.png"
            _write_mask(_only(found, entry.masks, name), mask, part)
    note = f"{category}: made from github.com/{part.repository} at {part.commit}; terms: {part.terms}\n"
    (made / "SOURCE.txt").write_text(note)


@cache
def _patterns(category: str) -> frozenset[str]:
    return frozenset(pattern for entry in entries(category) for pattern in (entry.images, entry.masks) if pattern)


def _only(found: dict[str, dict[str, list[Path]]], pattern: str, name: str) -> Path:
    hits = found[pattern].get(name, [])
    if len(hits) != 1:
        raise DatasetError(
            f"the repository has {len(hits)} files {pattern}/{name}.*, not one; it is not laid out as "
            "expected, please report it"
        )
    return hits[0]


def _write_image(source: Path, target: Path, part: Part) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if part.size is None:
        shutil.copyfile(source, target)
        return
    picture = Image.fromarray(read_image(source)).convert("L" if part.grey else "RGB")
    picture.resize(part.size, Image.Resampling.LANCZOS).save(target, quality=part.quality)


def _write_mask(source: Path, target: Path, part: Part) -> None:
    """Write a mask of 0 and 255, from a mask image or from labelme polygons."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        mask = _drawn(json.loads(source.read_text()))
    else:
        mask = Image.fromarray(read_mask(source).astype(np.uint8) * 255)
    mask.resize(part.size or mask.size, Image.Resampling.BOX).point([0] * 128 + [255] * 128).save(target)


def _drawn(label: dict) -> Image.Image:
    """Draw labelme polygons, edges included, in white on black."""
    canvas = Image.new("L", (label["imageWidth"], label["imageHeight"]))
    for shape in label["shapes"]:
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in shape["points"]], fill=255, outline=255)
    return canvas
