"""The embedded data set: three photographed textures and three rendered products, drawn once into the cache.

It exists so that every notebook, test and first try runs without a download. The photographs (brick, grass,
gravel) ship with scikit-image and are in the public domain (CC0); training and test crops come from
disjoint parts of them. The layout is MVTec AD's (`category/train/good/000.png`,
`category/test/<defect>/000.png`, `category/ground_truth/<defect>/000_mask.png`) plus `index.csv`. An image
depends on the seed, its category and its own name alone: never on how many images are drawn, in which
order, or by how many threads.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from hclib.data import demo_parts, demo_products
from hclib.data.demo_parts import SIZE, Array, Flaw
from hclib.paths import cache_dir

COLUMNS = ("path", "mask_path", "category", "split", "label", "defect")
VISIBLE = 6  # grey levels of 255 by which a defect must change a pixel to belong to the mask
SMALLEST = 24  # pixels of mask that a defect must have; one that hides completely is drawn anew


class DemoError(ValueError):
    """Say which argument of the renderer is wrong and what it may be."""


@dataclass(frozen=True)
class DemoCategory:
    """Describe a category: a sentence for readers, its defects, how to draw it, how plain its defects are."""

    description: str
    defects: tuple[str, ...]
    draw: Callable[[np.random.Generator, str, Flaw | None], Array]
    severity: tuple[float, float]  # defects are spread evenly between these, 0 hard to see, 1 plain


DEMO_CATEGORIES: dict[str, DemoCategory] = {
    "blister": DemoCategory(
        "A blister pack of twelve scored tablets (rendered).",
        ("broken_pill", "fibre", "missing_pill", "tear", "wrong_colour"),
        demo_products.draw_blister,
        (0.3, 1.0),
    ),
    "board": DemoCategory(
        "A populated circuit board, always the same layout (rendered).",
        ("bridge", "misprint", "missing_part", "scratch", "turned_part"),
        demo_products.draw_board,
        (0.5, 1.0),
    ),
    "brick": DemoCategory(
        "A brick wall (photograph, straightened and tinted).",
        ("crack", "efflorescence", "hole", "paint"),
        demo_parts.draw_brick,
        (0.0, 0.7),
    ),
    "gear": DemoCategory(
        "A turned steel gear in any rotation (rendered).",
        ("bent_tooth", "broken_tooth", "extra_hole", "rust", "scratch"),
        demo_products.draw_gear,
        (0.55, 1.0),
    ),
    "grass": DemoCategory(
        "A lawn with clover (photograph, tinted).",
        ("bald_patch", "litter", "wire", "yellowing"),
        demo_parts.draw_grass,
        (0.05, 0.95),
    ),
    "gravel": DemoCategory(
        "A bed of gravel (photograph, tinted).",
        ("bottle_cap", "oil", "sand", "weed"),
        demo_parts.draw_gravel,
        (0.3, 1.0),
    ),
}


def render_image(category: str, split: str, defect: str, number: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Draw one image of the demo set, its mask, and the image as it would be without the defect.

    Args:
        category: a key of `DEMO_CATEGORIES`.
        split: "train" or "test"; decides which part of a photograph is cut.
        defect: "good" or one of the category's defects.
        number: the image's number within its folder, from 0.
        seed: the set's seed, 0 or more.

    Returns:
        The image (256, 256, 3) uint8, its mask (256, 256) bool, and the sound image (256, 256, 3) uint8,
        which is equal to the first wherever the mask is False.

    Raises:
        DemoError: for an unknown category or defect, a defect in "train", or a negative number or seed.
    """
    kind = DEMO_CATEGORIES[_known([category])[0]]
    folders = ("train/good", "test/good", *(f"test/{name}" for name in kind.defects))
    if f"{split}/{defect}" not in folders or min(number, seed) < 0:
        raise DemoError(
            f"demo category {category!r} has no {split}/{defect} number {number} of seed {seed}; "
            f"it has {', '.join(folders)}, numbers and seeds from 0"
        )
    key = [seed, zlib.crc32(category.encode()), zlib.crc32(f"{split}/{defect}".encode()), number]
    sound = _eight_bit(kind.draw(np.random.default_rng(key), split, None))
    if defect == "good":
        return sound, np.zeros((SIZE, SIZE), bool), sound
    low, high = kind.severity
    severity = low + (high - low) * _spread(number, kind.defects.index(defect) / len(kind.defects))
    for attempt in range(1, 100):
        flaw = Flaw(defect, severity, np.random.default_rng([*key, attempt]))
        image = _eight_bit(kind.draw(np.random.default_rng(key), split, flaw))
        mask = _changed(image, sound)
        if mask.sum() >= SMALLEST:
            return np.where(mask[..., None], image, sound), mask, sound
    raise RuntimeError(f"{category}/{defect} number {number} of seed {seed} stayed invisible in 99 attempts")


def _known(categories: Sequence[str]) -> list[str]:
    for name in categories:
        if name not in DEMO_CATEGORIES:
            raise DemoError(f"no demo category {name!r}; there are: {', '.join(DEMO_CATEGORIES)}")
    return sorted(set(categories))


def _spread(number: int, offset: float) -> float:
    """Return the golden-ratio sequence in 0..1: however many numbers are drawn, they lie about evenly."""
    return (number + 0.5 + offset) * 0.6180339887498949 % 1


def _eight_bit(image: Array) -> Array:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _changed(image: Array, sound: Array) -> Array:
    """Return (H, W) bool: where two images differ visibly, small gaps closed and specks dropped."""
    from scipy.ndimage import binary_closing, label

    mask = np.abs(image.astype(np.int16) - sound).max(axis=-1) > VISIBLE
    mask |= binary_closing(mask, np.ones((3, 3)), iterations=2)
    regions, _ = label(mask, np.ones((3, 3)))
    return mask & (np.bincount(regions.ravel())[regions] >= 8)


def _write_png(path: Path, pixels: Array) -> None:
    """Write (H, W, 3) or (H, W) uint8 as PNG, without time stamps or other metadata."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_type=zlib.Z_RLE)  # noise has no repeats to look for
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream.getvalue())


def _plan(category: str, train: int, test: int) -> list[tuple[str, str, int]]:
    """Return (split, defect, number) of every image, in the order of the index."""
    defects = DEMO_CATEGORIES[category].defects
    share, extra = divmod(test // 2, len(defects))
    counts = [("train", "good", train), ("test", "good", test - test // 2)]
    counts += [("test", defect, share + (k < extra)) for k, defect in enumerate(defects)]
    return [(split, defect, number) for split, defect, count in counts for number in range(count)]


def _render(folder: Path, categories: Sequence[str], train: int, test: int, seed: int) -> None:
    """Write the images, the masks and `index.csv` into a folder."""
    rows = []
    for category in categories:
        for split, defect, number in _plan(category, train, test):
            image, mask, _ = render_image(category, split, defect, number, seed)
            path, mask_path = f"{category}/{split}/{defect}/{number:03d}.png", ""
            _write_png(folder / path, image)
            if defect != "good":
                mask_path = f"{category}/ground_truth/{defect}/{number:03d}_mask.png"
                _write_png(folder / mask_path, mask.astype(np.uint8) * 255)
            rows.append((path, mask_path, category, split, int(defect != "good"), defect))
    with open(folder / "index.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])


def _fingerprint(*asked: object) -> str:
    """Return a hash of all that decides the bytes: this code, the libraries that draw, what is asked for."""
    libraries = [f"{name}=={version(name)}" for name in ("numpy", "scipy", "scikit-image", "pillow")]
    digest = hashlib.sha256(json.dumps([asked, libraries]).encode())
    for module in (__file__, demo_parts.__file__, demo_products.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()[:12]


def render_demo(
    root: str | os.PathLike | None = None,
    seed: int = 0,
    *,
    categories: Sequence[str] | None = None,
    train: int = 60,
    test: int = 40,
) -> Path:
    """Render the demo set unless it is there already, and return its folder.

    The set is drawn beside its place and moved there when complete; several processes may ask for it at once.

    Args:
        root: the folder to render into: absent, empty, or an earlier demo set, which is replaced when it was
            drawn by other code or with other arguments. None: a folder of its own in the cache.
        seed: 0 or more; another seed gives other images of the same kind.
        categories: which of `DEMO_CATEGORIES` to draw; all of them when None.
        train: number of training images a category, all good.
        test: number of test images a category; half of them (rounded down) are anomalous, shared out evenly
            over the category's defects.

    Returns:
        The folder, in MVTec AD's layout, with `index.csv` (`path, mask_path, category, split, label, defect`;
        paths relative to the folder).

    Raises:
        DemoError: for an unknown category, a negative number, or a `root` that holds something else.
    """
    from filelock import FileLock

    names = _known(list(DEMO_CATEGORIES) if categories is None else list(categories))
    if not names or min(seed, train, test) < 0:
        raise DemoError(
            f"cannot render {len(names)} categories, train={train}, test={test}, seed={seed}: "
            f"at least one category, and no negative number"
        )
    key = _fingerprint(names, train, test, seed)
    target = Path(root).absolute() if root is not None else cache_dir() / "demo" / f"{key}-{seed}"
    stamp = target / "demo.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if stamp.is_file() and json.loads(stamp.read_text())["fingerprint"] == key:
            return target
        if target.exists() and not stamp.is_file() and any(target.iterdir()):
            raise DemoError(f"{target} holds something other than a demo set; name an empty or a new folder")
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            aside = Path(scratch) / "demo"
            aside.mkdir()
            _render(aside, names, train, test, seed)
            (aside / "demo.json").write_text(json.dumps({"fingerprint": key, "seed": seed}) + "\n")
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
    return target
