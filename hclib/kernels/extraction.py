"""Streamed encoding of many images into memory-mapped files that survive an interruption.

Threads decode the next images while the network runs; float16 maps and float32 tokens go straight into `.npy`
files. A folder holds one file per layer, `tokens.npy`, `clipped.npy` (one entry per chunk: -1 until its data
are on disk) and, once everything is there, `meta.json`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hclib.kernels.encoders import Encoder

CHUNK = {"cpu": 8, "cuda": 32}
"""Images per forward pass, by kind of device: fixed, because rounding may depend on it."""

HALF_MAX = float(np.finfo(np.float16).max)


def fill(
    folder: Path,
    encoder: Encoder,
    paths: list[str],
    settings: dict[str, Any],
    batch_size: int,
    progress: bool,
) -> None:
    """Encode images into a folder, going on where an interrupted call stopped; see `features.extract`.

    Args:
        folder: made when absent; the caller holds its lock.
        encoder: from `load_encoder`.
        paths: N image files.
        settings: written to `meta.json` at the end; `chunk` is the number of images per forward pass.
        batch_size: images between two writes to disk.
        progress: show a progress bar.

    Raises:
        ValueError: a network output that is not finite.
        ImageError: an image that cannot be read.
        OSError: less free space than the features need.
    """
    chunk, count = settings["chunk"], len(paths)
    store = _resume(folder, encoder)
    todo = list(range(-(-count // chunk))) if store is None else np.flatnonzero(store["clipped"] < 0).tolist()
    finished = count - sum(min(chunk, count - number * chunk) for number in todo)
    written: dict[int, int] = {}
    with tqdm(total=count, initial=finished, unit="image", desc=encoder.name, disable=not progress) as bar:
        for number, pixels in _decoded(encoder, paths, todo, chunk):
            rows = slice(number * chunk, number * chunk + len(pixels))
            padding = np.zeros((chunk - len(pixels), *pixels.shape[1:]), np.uint8)
            maps, tokens = encoder.forward(encoder.normalise(np.concatenate([pixels, padding])))
            if store is None:
                store = _create(folder, maps, tokens, count, len(todo))
            store["tokens"][rows] = tokens[: len(pixels)].cpu().numpy()
            written[number] = sum(
                _write_half(store[layer], rows, values[: len(pixels)], layer, paths) for layer, values in maps.items()
            )
            if len(written) * chunk >= batch_size:
                _commit(store, written)
            bar.update(len(pixels))
    _commit(store, written)
    _finish(folder, settings, int(store["clipped"].sum()))


def _resume(folder: Path, encoder: Encoder) -> dict[str, np.memmap] | None:
    files = {name: folder / f"{name}.npy" for name in (*encoder.layers, "tokens", "clipped")}
    if not all(file.is_file() for file in files.values()):
        return None
    return {name: np.lib.format.open_memmap(file, mode="r+") for name, file in files.items()}


def _create(
    folder: Path, maps: dict[str, torch.Tensor], tokens: torch.Tensor, count: int, chunks: int
) -> dict[str, np.memmap]:
    """Make empty files for `count` images in the shapes of a first result."""
    layout = {layer: ((count, *values.shape[1:]), np.dtype(np.float16)) for layer, values in maps.items()}
    layout["tokens"] = (count, tokens.shape[1]), np.dtype(np.float32)
    layout["clipped"] = (chunks,), np.dtype(np.int64)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed = sum(math.prod(shape) * kind.itemsize for shape, kind in layout.values())
    free = shutil.disk_usage(folder).free
    if needed > free:  # a full disk would kill the process: writing to mapped memory has no error to return
        reason = f"the features need {needed >> 20} MiB, {free >> 20} MiB are free"
        raise OSError(errno.ENOSPC, reason, str(folder))
    store = {
        name: np.lib.format.open_memmap(folder / f"{name}.part", mode="w+", dtype=kind, shape=shape)
        for name, (shape, kind) in layout.items()
    }
    store["clipped"][:] = -1  # once written: how many values of the chunk were clipped
    store["clipped"].flush()
    for name in layout:
        os.replace(folder / f"{name}.part", folder / f"{name}.npy")
    return store


def _decoded(
    encoder: Encoder, paths: list[str], todo: list[int], chunk: int, ahead: int = 3
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (chunk number, (b, 3, H, W) uint8) in order, decoding `ahead` chunks in advance on threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 2)) as pool:
        waiting = []
        try:
            for position in range(len(todo) + ahead):
                if position < len(todo):
                    files = paths[todo[position] * chunk : (todo[position] + 1) * chunk]
                    waiting.append([pool.submit(encoder.pixels, file) for file in files])
                if position >= ahead:
                    yield todo[position - ahead], np.stack([future.result() for future in waiting.pop(0)])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_half(target: np.memmap, rows: slice, values: torch.Tensor, layer: str, paths: list[str]) -> int:
    """Write (b, h, w, C) as float16, clipped to its range; return how many values were."""
    largest = float(values.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{layer} is not finite in a chunk from {paths[rows.start]} on: weights or device are broken")
    beyond = 0
    if largest > HALF_MAX:
        beyond = int((values.abs() > HALF_MAX).sum())
        values = values.clamp(-HALF_MAX, HALF_MAX)
    target[rows] = values.half().cpu().numpy()
    return beyond


def _commit(store: dict[str, np.memmap], written: dict[int, int]) -> None:
    """Flush data first and the marks that they are there second, so that a mark never lies."""
    for name, array in store.items():
        if name != "clipped":
            array.flush()
    for number, clipped in written.items():
        store["clipped"][number] = clipped
    store["clipped"].flush()
    written.clear()


def _finish(folder: Path, settings: dict[str, Any], clipped: int) -> None:
    if clipped:
        warnings.warn(f"{clipped} feature values beyond {HALF_MAX:.0f} were clipped to fit float16", stacklevel=5)
    aside = folder / "meta.json.part"
    aside.write_text(json.dumps(settings | {"clipped": clipped, "torch": torch.__version__}, indent=1))
    os.replace(aside, folder / "meta.json")
