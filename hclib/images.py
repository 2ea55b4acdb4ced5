"""Images and masks from files, and the one rule by which masks shrink.

Every room that opens a picture does it here, so that a file means the same pixels everywhere. Nothing is
resized or normalised on reading; the conversions to 8-bit RGB are listed in `read_image`, those to a binary
mask in `read_mask`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Lower-case suffixes of the files taken for images; compare with `path.suffix.lower()`."""

CLASS_NUMBERS_UP_TO = 31
"""A mask with no value above this one holds class numbers, not greys: its non-zero pixels are anomalous."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_EXIF_ORIENTATION = 274


class ImageError(ValueError):
    """An image or a mask that cannot be used; the message names the file, the reason and what to do."""


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as 8-bit RGB.

    Conversions, whatever the file's format: grey is repeated on three channels; palettes are looked up; alpha
    is dropped and the colour under it kept; CMYK, YCbCr and HSV are converted by Pillow without a colour
    profile; 16-bit grey is divided by 257 and rounded (65535 -> 255), never stretched to the range in use;
    16-bit colour keeps its high byte, as Pillow decodes it; floats must lie in 0..1 and are multiplied by
    255; of an animation or a multi-page TIFF the first frame is read. An EXIF orientation is applied, so that
    the picture stands as viewers show it; its mask must be drawn on the upright picture.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: when the file is missing, empty, truncated, no image, or holds values without a stated
            conversion.
    """
    with _opened(path) as image:
        return np.array(_rgb(image, path))


def read_mask(path: str | os.PathLike, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read a ground-truth mask: True where the brightest channel exceeds 127 of 255.

    The file is converted to 8-bit RGB as in `read_image`, so palettes, 16 bits, alpha and colours are
    accepted. A mask in which nothing exceeds 31 holds class numbers (VisA's go up to 9: `id2class.json` of
    amazon-science/spot-diff): there, every non-zero pixel is True. An all-zero mask is read as empty, not
    refused: MTD has four of them.

    Args:
        path: mask file.
        shape: (H, W) that the mask must have, usually its image's.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: when the file cannot be read, or `shape` is given and differs.
    """
    with _opened(path) as image:
        if image.mode == "L":
            values = np.asarray(image)
        elif image.mode.startswith("I") and image.getextrema()[1] <= CLASS_NUMBERS_UP_TO:
            values = np.asarray(image)
        else:
            values = np.asarray(_rgb(image, path)).max(axis=2)  # (H, W)
    if shape is not None and values.shape != tuple(shape):
        raise ImageError(
            f"{path}: the mask is {values.shape[1]} x {values.shape[0]} pixels, its image {shape[1]} x "
            f"{shape[0]}; draw masks at the size of their image (after its EXIF rotation, if it has one)"
        )
    return values > (127 if values.max(initial=0) > CLASS_NUMBERS_UP_TO else 0)


def image_shape(path: str | os.PathLike) -> tuple[int, int]:
    """Return (H, W) of the picture that `read_image` would give, from the file's header alone.

    Raises:
        ImageError: when the file is missing, empty or no image.
    """
    with _opened(path, decode=False) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def resize_mask(mask: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize a binary mask by exact area average: True where at least half of the area is.

    A mask that is not empty never vanishes: where no pixel reaches one half, those of the largest average are
    kept.

    Args:
        mask: (H, W) bool.
        size: height and width of the result, or one number for both.

    Returns:
        (h, w) bool.
    """
    h, w = (size, size) if isinstance(size, int | np.integer) else size
    height, width = mask.shape
    if (h, w) == (height, width):
        return np.array(mask, bool)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((h, w), bool)
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    area = _sums(_sums(part, h, rows[0], height).T, w, columns[0], width).T  # (h, w), height * width when full
    resized = 2 * area >= height * width
    return resized if resized.any() else area == area.max()


def read_masks(index: pd.DataFrame, size: int) -> np.ndarray:
    """Read the masks of an index frame at one square size, in its row order.

    A row with an empty `mask_path` gives an empty mask; leave anomalous rows without a mask out of pixel
    metrics.

    Args:
        index: frame with `path` and `mask_path`; of N rows.
        size: height and width of the result.

    Returns:
        (N, size, size) bool.

    Raises:
        ImageError: when a mask cannot be read or differs in size from its image (checked where the image file
            exists).
    """
    masks = np.zeros((len(index), size, size), bool)
    for row, (path, mask_path) in enumerate(zip(index["path"], index["mask_path"], strict=True)):
        if mask_path:
            shape = image_shape(path) if Path(path).exists() else None
            masks[row] = resize_mask(read_mask(mask_path, shape), size)
    return masks


@contextmanager
def _opened(path: str | os.PathLike, decode: bool = True) -> Iterator[Image.Image]:
    """Open, decode and set upright an image; every failure is an ImageError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such file; check the path, or the index that names it")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes); copy it again from its source")
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
                if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
                    image = ImageOps.exif_transpose(image)
            yield image
    except ImageError:
        raise
    except _BROKEN as error:
        reason = "no image format that Pillow knows" if "cannot identify" in str(error) else str(error)
        raise ImageError(f"{path}: cannot be read as an image: {reason}; replace the file or leave it out") from error


def _rgb(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    """Convert a decoded image to mode RGB by the rules of `read_image`."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bit(np.asarray(image), path))
    elif image.mode == "P":  # by way of RGBA: the colours under a transparent entry stay, and Pillow does not warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bit(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Convert 16-bit or float grey values (H, W) to uint8 by the rules of `read_image`."""
    low, high = values.min(), values.max()
    top = 1.0 if values.dtype.kind == "f" else 65535
    if not (low >= 0 and high <= top):  # also true for NaN
        raise ImageError(
            f"{path}: {values.dtype} values from {low} to {high}, where 0 to {top} has a stated meaning; "
            "convert the file to 8 or 16 bits"
        )
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def _sums(values: np.ndarray, parts: int, start: int, length: int) -> np.ndarray:
    """Sum the rows of a (length, m) array over `parts` equal stretches, times `parts`; in whole numbers.

    Of the array, `values` (n, m) are the rows from `start` on; the others are zero. Gives (parts, m) int64.
    """
    edges = np.clip(np.arange(parts + 1) * length - start * parts, 0, len(values) * parts)
    whole, rest = np.divmod(edges, parts)  # edge i lies rest / parts into row whole
    before = np.zeros((len(values) + 2, values.shape[1]), np.int64)  # sums over the rows before each one
    np.cumsum(values, axis=0, out=before[1:-1])
    before[-1] = before[-2]
    return np.diff((parts - rest)[:, None] * before[whole] + rest[:, None] * before[whole + 1], axis=0)
