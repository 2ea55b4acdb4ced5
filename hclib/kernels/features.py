"""Features of a whole index, cached on disk, and the patch vectors that detectors work on.

The cache is `cache_dir()/features/<encoder>-<images>`: the first part stands for weights, layers and
preprocessing, the second for the bytes of every image in order. A changed byte gives a new folder, and
nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock

from hclib.kernels.encoders import Encoder
from hclib.kernels.extraction import CHUNK, fill
from hclib.paths import cache_dir

_FORMAT = 1  # raise when the meaning of the cached files changes
_BLOCK = 32  # images per step of `local_patches`


class MapRows:
    """Chosen rows of feature maps, read from the underlying array only when indexed.

    Stands for a read-only (n, h, w, C) array: `shape`, `dtype`, `ndim`, `len`, `numpy.asarray`, and indexing,
    which gives plain arrays and reads no other images than the first part of the key picks.
    """

    def __init__(self, base: np.ndarray, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows
        self.shape, self.dtype, self.ndim = (len(rows), *base.shape[1:]), base.dtype, base.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if first is Ellipsis or first is None:
            return np.asarray(self)[key]
        picked = self.rows[first]
        read = self.base[picked]
        return read[tuple(rest)] if np.ndim(picked) == 0 else read[(slice(None), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.base[self.rows], dtype=dtype)


@dataclass(frozen=True)
class Features:
    """What an encoder saw in the images of an index; rows in the order of the index.

    Attributes:
        maps: layer -> (N, h, w, C) float16, memory-mapped (or `MapRows` of such an array).
        tokens: (N, D) float32 image tokens, not normalised.
        index: the index frame, N rows.
        encoder: name, image_size, layers, token and weights_hash of the encoder.
    """

    maps: dict[str, Any]
    tokens: np.ndarray
    index: pd.DataFrame
    encoder: dict[str, Any]

    def __post_init__(self) -> None:
        lengths = {"tokens": len(self.tokens), "index": len(self.index)}
        lengths |= {layer: len(values) for layer, values in self.maps.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the parts of the features differ in their number of rows: {lengths}")

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, rows: Any) -> Features:
        """Return the features of some rows without copying maps; they are read when indexed.

        Args:
            rows: (N,) bool mask (array or Series), or (n,) int indices in the order wanted.

        Raises:
            ValueError: when a mask has another length than the features.
            IndexError: when an index lies outside.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise ValueError(f"the mask has shape {rows.shape}, the features have {len(self)} rows")
        picked = np.arange(len(self))[rows if rows.size else rows.astype(int)]  # (n,)
        return self._take(picked, self.index.iloc[picked].reset_index(drop=True))

    def align(self, index: pd.DataFrame) -> Features:
        """Return the features of the images of another index, found by path, without encoding anew.

        For indices made of the same files in another order or split, such as contaminated training sets:
        encode the whole data set once and align.

        Args:
            index: index frame whose every path is in `self.index`; becomes the result's index.

        Raises:
            ValueError: when a path was not encoded; names the first.
        """
        where = pd.Series(np.arange(len(self)), index=self.index["path"])
        where = where[~where.index.duplicated()].reindex(index["path"])
        if where.isna().any():
            count, first = int(where.isna().sum()), where.index[where.isna()][0]
            raise ValueError(f"{count} images of the index were not encoded, first {first}; extract them too")
        return self._take(where.to_numpy(int), index)

    def _take(self, picked: np.ndarray, index: pd.DataFrame) -> Features:
        maps = {layer: _pick(values, picked) for layer, values in self.maps.items()}
        return Features(maps, self.tokens[picked], index, self.encoder)


def _pick(base: Any, picked: np.ndarray) -> Any:
    if isinstance(base, MapRows):
        base, picked = base.base, base.rows[picked]
    if len(picked) and np.array_equal(picked, np.arange(picked[0], picked[0] + len(picked))):
        return base[picked[0] : picked[0] + len(picked)]  # a view
    return MapRows(base, picked)


def extract(
    encoder: Encoder,
    index: pd.DataFrame,
    *,
    batch_size: int = 64,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> Features:
    """Encode every image of an index, or open what an earlier call has encoded.

    The contents of the files decide: the same images in another order, split or place, or a part of them (a
    contaminated training set, one category), are read from the features of the whole. Two processes may ask
    for the same features: one works, the other waits. An interrupted extraction resumes where its data end.
    The stored bytes do not depend on `batch_size`: the network always runs on chunks of one size, the last
    one padded. Values beyond float16 (65504) are clipped, counted in `meta.json` and warned of.

    Args:
        encoder: from `load_encoder`.
        index: index frame; `path` is read.
        batch_size: images between two writes to disk, rounded up to whole chunks.
        cache: folder of the cached features; default `cache_dir()/features`.
        progress: show a progress bar.

    Returns:
        `Features` with read-only memory-mapped maps; `.index` is `index`.

    Raises:
        ValueError: an index without rows; a network output that is not finite (names the first image).
        FileNotFoundError: a file of the index that is not there.
        ImageError: an image that cannot be read.
        OSError: less free space than the features need.
    """
    if not len(index):
        raise ValueError("the index has no rows: nothing to extract")
    paths = index["path"].tolist()
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_hash_file, paths))
    root = Path(cache) if cache is not None else cache_dir() / "features"
    root.mkdir(parents=True, exist_ok=True)
    recipe = {
        "format": _FORMAT,
        "encoder": encoder.describe(),
        "preprocessing": encoder.preprocessing,
        "device": encoder.device.type,
        "chunk": CHUNK[encoder.device.type],
    }
    own = root / f"{_digest(recipe, 12)}-{_digest(hashes, 20)}"
    found = _find(own, hashes)
    if found is None:
        with FileLock(f"{own}.lock"):
            found = _find(own, hashes)
            if found is None:
                fill(own, encoder, paths, recipe | {"files": hashes}, batch_size, progress)
                found = own, np.arange(len(paths))
    folder, rows = found
    maps = {layer: _pick(np.load(folder / f"{layer}.npy", mmap_mode="r"), rows) for layer in encoder.layers}
    return Features(maps, np.load(folder / "tokens.npy")[rows], index, encoder.describe())


def _find(own: Path, hashes: list[str]) -> tuple[Path, np.ndarray] | None:
    """Look for complete features of these files or more; give the folder and the rows of the files."""
    if (own / "meta.json").is_file():
        return own, np.arange(len(hashes))
    for meta in sorted(own.parent.glob(f"{own.name.split('-')[0]}-*/meta.json")):
        rows = {content: row for row, content in enumerate(json.loads(meta.read_text())["files"])}
        if rows.keys() >= set(hashes):
            return meta.parent, np.array([rows[content] for content in hashes])
    return None


def _digest(content: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def _hash_file(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: in the index, not readable ({error.strerror}); rebuild the index or restore the file"
        ) from error


def local_patches(features: Features, rows: Any = slice(None), *, dim: int = 1024, patch_size: int = 3) -> torch.Tensor:
    """Return the patch vectors that nearest-neighbour detectors compare.

    Two layers of a CNN pyramid become PatchCore's embedding (`patchcore_embedding`, neighbourhood 3). Layers
    of one grid (transformers) are each averaged over `patch_size` x `patch_size` neighbours, positions
    outside not counted, and concatenated.

    Args:
        features: N images.
        rows: which images (slice, mask or indices).
        dim: width of PatchCore's embedding; layers of one grid keep their own widths.
        patch_size: odd side of the neighbourhood; 1 leaves tokens as they are.

    Returns:
        (n, h, w, C) float32 on the CPU.

    Raises:
        ValueError: layers of different grids that are not a pyramid of two, fine then coarse; a `patch_size`
            that is even, or not 3 for a pyramid.
    """
    if patch_size < 1 or patch_size % 2 == 0:
        raise ValueError(f"patch_size {patch_size}: the neighbourhood of a patch has an odd side")
    shapes = {layer: tuple(maps.shape[1:]) for layer, maps in features.maps.items()}  # (h, w, C) each
    pyramid = len({shape[:2] for shape in shapes.values()}) > 1
    (h, w, _), (h_last, *_) = next(iter(shapes.values())), [*shapes.values()][-1]
    if pyramid and (len(shapes) != 2 or h <= h_last):
        raise ValueError(f"layers {shapes}: use layers of one grid, or two of which the second is coarser")
    if pyramid and patch_size != 3:
        raise ValueError(f"patch_size {patch_size}: PatchCore's embedding of a CNN pyramid is defined for 3")
    picked = np.arange(len(features))[rows].reshape(-1)
    width = dim if pyramid else sum(shape[2] for shape in shapes.values())
    result = torch.empty(len(picked), h, w, width)
    for start in range(0, len(picked), _BLOCK):
        block = picked[start : start + _BLOCK]
        stages = [
            torch.from_numpy(np.asarray(maps[block], dtype=np.float32)).permute(0, 3, 1, 2)  # (b, C, h, w)
            for maps in features.maps.values()
        ]
        result[start : start + _BLOCK] = (
            patchcore_embedding(*stages, dim=dim) if pyramid else _neighbourhood_means(stages, patch_size)
        )
    return result


def _neighbourhood_means(stages: list[torch.Tensor], side: int) -> torch.Tensor:
    means = [F.avg_pool2d(stage, side, 1, side // 2, count_include_pad=False) for stage in stages]
    return torch.cat(means, dim=1).permute(0, 2, 3, 1)  # (b, h, w, C)


def patchcore_embedding(layer2: torch.Tensor, layer3: torch.Tensor, dim: int = 1024) -> torch.Tensor:
    """Compute PatchCore's locally aware patch vectors from two stages of a CNN.

    The definition: unfold 3 x 3 (stride 1, zeros outside), resize the coarser stage's patches bilinearly to
    the finer grid, pool each stage's C * 9 values adaptively to `dim`, and both together to `dim` again. All
    steps are linear, and pooling over channels commutes with resizing over positions. For 512 and 1024
    channels and `dim` 1024 they collapse to a depthwise convolution with weights 0.1 (centre 0.2), and a 3 x
    3 mean followed by the mean of channel pairs.

    Args:
        layer2: (N, C2, h, w) floating point.
        layer3: (N, C3, h3, w3) floating point, usually of half the grid.
        dim: width of the result.

    Returns:
        (N, h, w, dim) float32.

    Source: Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, section 3.1;
    patchcore-inspection patchcore.py:112-135 and 282-308, common.py:145-183; closed form: reference notes,
    0.1.
    """
    size = layer2.shape[-2:]
    layer2, layer3 = layer2.float(), layer3.float()
    if (layer2.shape[1], layer3.shape[1], dim) == (512, 1024, 1024):
        kernel = torch.full((512, 1, 3, 3), 0.1, device=layer2.device)
        kernel[:, :, 1, 1] = 0.2
        fine = F.conv2d(layer2, kernel, padding=1, groups=512)  # (N, 512, h, w)
        coarse = F.avg_pool2d(layer3, 3, 1, 1).unflatten(1, (512, 2)).mean(dim=2)  # (N, 512, h3, w3)
        coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).contiguous()
    coarse = _pooled_patches(layer3, dim).permute(0, 3, 1, 2)  # (N, dim, h3, w3)
    coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    both = torch.cat([_pooled_patches(layer2, dim), coarse], dim=-1)  # (N, h, w, 2 * dim)
    return F.adaptive_avg_pool1d(both.flatten(0, 2).unsqueeze(1), dim).view(*both.shape[:3], dim)


def _pooled_patches(maps: torch.Tensor, dim: int) -> torch.Tensor:
    patches = F.unfold(maps, 3, padding=1).transpose(1, 2)  # (N, h * w, C * 9)
    return F.adaptive_avg_pool1d(patches, dim).unflatten(1, maps.shape[-2:])  # (N, h, w, dim)
