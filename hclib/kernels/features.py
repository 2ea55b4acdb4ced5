"""Features of a whole index on disk, and the patch vectors that detectors work on.

Extraction streams: threads decode the next images while the network runs, float16 maps go straight into memory-mapped
`.npy` files under `cache_dir()/features/<key>`. The key covers the encoder's weights, layers and preprocessing and the bytes
of every image, so a changed byte gives a new folder and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

from hclib.kernels.encoders import Encoder
from hclib.paths import cache_dir

CHUNK = {"cpu": 8, "cuda": 32}  # images per forward pass: fixed, because rounding depends on it
HALF_MAX = float(np.finfo(np.float16).max)
FORMAT = 1  # raise when the meaning of the cached files changes


class MapRows:
    """Chosen rows of feature maps, read from the underlying array only when indexed.

    Behaves like a read-only (n, h, w, C) array: `shape`, `dtype`, `len`, `numpy.asarray`, and indexing whose first part
    picks rows (number, slice, mask or index array) and returns a plain array.
    """

    def __init__(self, base: np.ndarray, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows
        self.shape, self.dtype, self.ndim = (len(rows), *base.shape[1:]), base.dtype, base.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        return self.base[self.rows[first]][(..., *rest) if first is Ellipsis else _after_rows(self.rows[first], rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.base[self.rows], dtype=dtype)


def _after_rows(picked: np.ndarray | np.integer, rest: list) -> tuple:
    return tuple(rest) if np.ndim(picked) == 0 else (slice(None), *rest)


@dataclass(frozen=True)
class Features:
    """What an encoder saw in the images of an index; rows in the order of the index.

    Attributes:
        maps: layer -> (N, h, w, C) float16, memory-mapped.
        tokens: (N, D) float32 image tokens, not normalised.
        index: the index frame, N rows.
        encoder: name, image_size, layers, token and weights_hash of the encoder.
    """

    maps: dict[str, Any]
    tokens: np.ndarray
    index: pd.DataFrame
    encoder: dict[str, Any]

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.index), *(len(value) for value in self.maps.values())}
        if len(lengths) != 1:
            raise ValueError(f"maps, tokens and index differ in their number of rows: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, rows: Any) -> Features:
        """Return the features of some rows without copying maps; they are read when indexed.

        Args:
            rows: (N,) bool mask (array or Series), or (n,) int indices in the order wanted.

        Raises:
            ValueError: when a mask has another length.
            IndexError: when an index lies outside.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise ValueError(f"mask has shape {rows.shape}, expected ({len(self)},)")
        picked = np.arange(len(self))[rows if rows.size else rows.astype(int)]  # (n,)
        index = self.index.iloc[picked].reset_index(drop=True)
        maps = {layer: _pick(value, picked) for layer, value in self.maps.items()}
        return Features(maps, self.tokens[picked], index, self.encoder)


def _pick(base: Any, picked: np.ndarray) -> Any:
    if isinstance(base, MapRows):
        base, picked = base.base, base.rows[picked]
    if len(picked) and np.array_equal(picked, np.arange(picked[0], picked[0] + len(picked))):
        return base[picked[0] : picked[0] + len(picked)]
    return MapRows(base, picked)


def extract(
    encoder: Encoder,
    index: pd.DataFrame,
    *,
    batch_size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> Features:
    """Encode every image of an index, or open the result of an earlier call.

    Two processes may ask for the same features: one works, the other waits. An interrupted extraction resumes where
    the data on disk end. The stored bytes do not depend on `batch_size`: the network always runs on chunks of one size,
    the last one padded. Values beyond float16 (65504) are clipped, counted in `meta.json` and warned of.

    Args:
        encoder: from `load_encoder`.
        index: index frame; `path` is read.
        batch_size: images between two writes to disk, rounded up to whole chunks; default 64.
        cache: folder of the cached features; default `cache_dir()/features`.
        progress: show a progress bar.

    Returns:
        `Features` with memory-mapped maps; `.index` is `index`.

    Raises:
        ValueError: an empty index; a network output that is not finite (names the images).
        ImageError: an image that cannot be read.
    """
    if not len(index):
        raise ValueError("the index has no rows: nothing to extract")
    paths = index["path"].tolist()
    settings = _settings(encoder, paths)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    root = Path(cache) if cache is not None else cache_dir() / "features"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    if not (folder / "meta.json").is_file():
        with FileLock(root / f"{key}.lock"):
            if not (folder / "meta.json").is_file():
                _fill(folder, encoder, paths, settings, batch_size or 64, progress)
    maps = {layer: np.load(folder / f"{layer}.npy", mmap_mode="r") for layer in encoder.layers}
    return Features(maps, np.load(folder / "tokens.npy"), index, encoder.describe())


def _settings(encoder: Encoder, paths: list[str]) -> dict[str, Any]:
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(_hash_file, paths))
    return {
        "format": FORMAT,
        "encoder": encoder.describe(),
        "preprocessing": encoder.preprocessing,
        "device": encoder.device.type,
        "chunk": CHUNK.get(encoder.device.type, 8),
        "files": hashes,
    }


def _hash_file(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise FileNotFoundError(f"{path}: listed in the index but cannot be read ({error.strerror})") from error


def _fill(
    folder: Path, encoder: Encoder, paths: list[str], settings: dict[str, Any], batch_size: int, progress: bool
) -> None:
    chunk = settings["chunk"]
    starts = range(0, len(paths), chunk)
    store = _open_store(folder, encoder, len(paths), len(starts))
    todo = [number for number in range(len(starts)) if not store["done"][number]]
    clipped = 0
    written: list[int] = []
    bar = tqdm(total=len(paths), unit="image", desc=encoder.name, disable=not progress)
    bar.update(len(paths) - sum(min(chunk, len(paths) - starts[number]) for number in todo))
    for number, pixels in _decoded(encoder, paths, [(number, starts[number]) for number in todo], chunk):
        rows = slice(starts[number], starts[number] + len(pixels))
        padded = np.concatenate([pixels, np.zeros((chunk - len(pixels), *pixels.shape[1:]), np.uint8)])
        maps, tokens = encoder.forward(encoder.normalise(padded))
        store["tokens"][rows] = tokens[: len(pixels)].float().cpu().numpy()
        for layer, values in maps.items():
            clipped += _write_half(store[layer], rows, values[: len(pixels)], layer, paths)
        written.append(number)
        if len(written) * chunk >= batch_size:
            _commit(store, written)
        bar.update(len(pixels))
    _commit(store, written)
    bar.close()
    _finish(folder, settings, clipped)


def _open_store(folder: Path, encoder: Encoder, count: int, chunks: int) -> dict[str, np.memmap]:
    layout = _layout(encoder, count) | {"done": ((chunks,), np.bool_)}
    files = {name: folder / f"{name}.npy" for name in layout}
    if all(file.is_file() for file in files.values()):
        store = {name: np.lib.format.open_memmap(file, mode="r+") for name, file in files.items()}
        if all(store[name].shape == shape and store[name].dtype == kind for name, (shape, kind) in layout.items()):
            return store
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {
        name: np.lib.format.open_memmap(files[name], mode="w+", dtype=kind, shape=shape)
        for name, (shape, kind) in layout.items()
    }


def _layout(encoder: Encoder, count: int) -> dict[str, tuple[tuple[int, ...], type]]:
    side = encoder.image_size
    maps, tokens = encoder.forward(torch.zeros(1, 3, side, side, device=encoder.device))
    shapes = {layer: ((count, *values.shape[1:]), np.float16) for layer, values in maps.items()}
    return shapes | {"tokens": ((count, tokens.shape[1]), np.float32)}


def _decoded(
    encoder: Encoder, paths: list[str], todo: list[tuple[int, int]], chunk: int, ahead: int = 3
) -> Iterator[tuple[int, np.ndarray]]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:

        def submit(position: int) -> list:
            start = todo[position][1]
            return [pool.submit(encoder.pixels, path) for path in paths[start : start + chunk]]

        waiting = {position: submit(position) for position in range(min(ahead, len(todo)))}
        try:
            for position, (number, _) in enumerate(todo):
                pixels = np.stack([future.result() for future in waiting.pop(position)])  # (b, 3, H, W)
                if position + ahead < len(todo):
                    waiting[position + ahead] = submit(position + ahead)
                yield number, pixels
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_half(target: np.memmap, rows: slice, values: torch.Tensor, layer: str, paths: list[str]) -> int:
    if not torch.isfinite(values).all():
        raise ValueError(f"{layer} is not finite for the images {paths[rows][:3]}...: the weights or the device are broken")
    beyond = int((values.abs() > HALF_MAX).sum())
    target[rows] = values.clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy()
    return beyond


def _commit(store: dict[str, np.memmap], written: list[int]) -> None:
    for name, array in store.items():
        if name != "done":
            array.flush()
    store["done"][written] = True
    store["done"].flush()
    written.clear()


def _finish(folder: Path, settings: dict[str, Any], clipped: int) -> None:
    if clipped:
        warnings.warn(f"{clipped} feature values beyond {HALF_MAX:.0f} were clipped to fit float16", stacklevel=2)
    meta = settings | {"clipped": clipped, "torch": torch.__version__}
    aside = folder / "meta.json.part"
    aside.write_text(json.dumps(meta, indent=1))
    os.replace(aside, folder / "meta.json")


def local_patches(
    features: Features, rows: Any = slice(None), *, dim: int = 1024, patch_size: int = 3
) -> torch.Tensor:
    """Return the patch vectors that nearest-neighbour detectors compare.

    Two layers of a CNN pyramid become PatchCore's embedding (`patchcore_embedding`, neighbourhood 3). Layers of one grid
    (transformers) are each averaged over `patch_size` x `patch_size` neighbours, positions outside not counted, and
    concatenated.

    Args:
        features: N images.
        rows: which images (slice, mask or indices).
        dim: width of PatchCore's embedding; not used for layers of one grid.
        patch_size: odd side of the neighbourhood; 1 leaves tokens as they are.

    Returns:
        (n, h, w, C) float32 on the CPU.

    Raises:
        ValueError: layers of different grids that are not a two-layer pyramid; an even or unfitting `patch_size`.
    """
    layers = {name: torch.from_numpy(np.array(maps[rows], dtype=np.float32)) for name, maps in features.maps.items()}
    grids = [tuple(values.shape[1:3]) for values in layers.values()]
    if patch_size < 1 or patch_size % 2 == 0:
        raise ValueError(f"patch_size {patch_size}: the neighbourhood of a patch has an odd side")
    first_last = [values.permute(0, 3, 1, 2) for values in layers.values()]  # (n, C, h, w) each
    if len(set(grids)) == 1:
        pooled = [F.avg_pool2d(x, patch_size, 1, patch_size // 2, count_include_pad=False) for x in first_last]
        return torch.cat(pooled, dim=1).permute(0, 2, 3, 1).contiguous()
    if len(grids) != 2 or grids[0][0] <= grids[1][0]:
        raise ValueError(f"layers {tuple(layers)} have the grids {grids}: use layers of one grid, or two, fine then coarse")
    if patch_size != 3:
        raise ValueError(f"patch_size {patch_size}: PatchCore's embedding of a CNN pyramid is defined for 3")
    return patchcore_embedding(*first_last, dim=dim)


def patchcore_embedding(layer2: torch.Tensor, layer3: torch.Tensor, dim: int = 1024) -> torch.Tensor:
    """Compute PatchCore's locally aware patch vectors from two stages of a CNN.

    The definition: unfold 3 x 3 (stride 1, zeros outside), resize the coarser stage's patches bilinearly to the finer grid,
    pool each stage's C * 9 values adaptively to `dim`, both together to `dim` again. All steps are linear and pooling
    over channels commutes with resizing over positions. For 512 and 1024 channels and `dim` 1024 they collapse to a depthwise
    convolution with weights 0.1 (centre 0.2) and a 3 x 3 mean followed by the mean of channel pairs.

    Args:
        layer2: (N, C2, h, w) float.
        layer3: (N, C3, h3, w3) float, usually (N, C3, h / 2, w / 2).
        dim: width of the result.

    Returns:
        (N, h, w, dim) float32.

    Source: Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022, section 3.1; patchcore-inspection
    patchcore.py:112-135 and 282-308, common.py:145-183; closed form: reference notes, finding 1.
    """
    size = layer2.shape[-2:]
    layer2, layer3 = layer2.float(), layer3.float()
    if (layer2.shape[1], layer3.shape[1], dim) == (512, 1024, 1024):
        kernel = torch.full((512, 1, 3, 3), 0.1, device=layer2.device)
        kernel[:, :, 1, 1] = 0.2
        fine = F.conv2d(layer2, kernel, padding=1, groups=512)  # (N, 512, h, w)
        coarse = F.avg_pool2d(layer3, 3, 1, 1).unflatten(1, (512, 2)).mean(dim=2)
        coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).contiguous()
    coarse = _pooled_patches(layer3, dim).permute(0, 3, 1, 2)  # (N, dim, h3, w3)
    coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    both = torch.cat([_pooled_patches(layer2, dim), coarse], dim=-1)  # (N, h, w, 2 * dim)
    return F.adaptive_avg_pool1d(both.flatten(0, 2).unsqueeze(1), dim).view(*both.shape[:3], dim)


def _pooled_patches(maps: torch.Tensor, dim: int) -> torch.Tensor:
    patches = F.unfold(maps, 3, padding=1).transpose(1, 2)  # (N, h * w, C * 9)
    return F.adaptive_avg_pool1d(patches, dim).unflatten(1, maps.shape[-2:])  # (N, h, w, dim)
