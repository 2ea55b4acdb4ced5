"""From patch scores to anomaly maps to image scores.

Bilinear upsampling and Gaussian smoothing are linear and separable, so a map is A @ patch @ B.T with two
small matrices: the same numbers as interpolation followed by a filter over every pixel, to float32 rounding,
at a fraction of the work.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

Array = TypeVar("Array", np.ndarray, torch.Tensor)

CHUNK_PIXELS = 1 << 24  # pixels of upsampled maps held at a time: 64 MB


@dataclass(frozen=True)
class Scores:
    """What a detector says about N images.

    Attributes:
        patch: (N, h, w) float32, one anomaly score per patch.
        image: (N,) float32.
        group: (N,) int64, the memory bank that an image was routed to; -1 where there is none.
        sigma: standard deviation of the Gaussian that `upsample` smooths with, in pixels of the upsampled
            map; 4 as in the reference program of PatchCore (common.py:186-208), 0 for none.
        align_corners: how `upsample` interpolates; True is MuSc's choice (musc.py:225-226).
    """

    patch: np.ndarray
    image: np.ndarray
    group: np.ndarray
    sigma: float = 4.0
    align_corners: bool = False

    def __post_init__(self) -> None:
        for name, kind, dims in (("patch", np.float32, 3), ("image", np.float32, 1), ("group", np.int64, 1)):
            array = np.ascontiguousarray(getattr(self, name), dtype=kind)
            if array.ndim != dims or len(array) != len(self.patch):
                raise ValueError(
                    f"{name}: shape {array.shape}; patch (N, h, w), image (N,) and group (N,) belong together"
                )
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise ValueError(f"{name}: row {row} is not finite; the detector gave no score for that image")
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.patch)

    def upsample(self, size: int | tuple[int, int]) -> np.ndarray:
        """Return pixel maps (N, H, W) float32, interpolated and smoothed; N * H * W * 4 bytes."""
        return upsample(self.patch, size, align_corners=self.align_corners, sigma=self.sigma)

    def subset(self, rows: Any) -> Scores:
        """Return the scores of some images: a bool mask (N,), a slice, or indices."""
        rows = rows if isinstance(rows, slice) else np.asarray(rows)
        return Scores(self.patch[rows], self.image[rows], self.group[rows], self.sigma, self.align_corners)

    def save(self, path: str | PathLike) -> None:
        """Write everything to one safetensors file, bit for bit."""
        meta = {"sigma": json.dumps(self.sigma), "align_corners": json.dumps(self.align_corners)}
        save_file({"patch": self.patch, "image": self.image, "group": self.group}, path, metadata=meta)

    @classmethod
    def load(cls, path: str | PathLike) -> Scores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something other than scores.
        """
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if not {"patch", "image", "group"} <= set(file.keys()) or "sigma" not in meta:
                raise ValueError(f"{path}: holds {sorted(file.keys())}, not what Scores.save writes")
            arrays = [file.get_tensor(name) for name in ("patch", "image", "group")]
        return cls(*arrays, json.loads(meta["sigma"]), json.loads(meta["align_corners"]))


def upsample(patch: Array, size: int | tuple[int, int], *, align_corners: bool = False, sigma: float = 0.0) -> Array:
    """Interpolate patch scores bilinearly to pixels, then smooth with a Gaussian.

    Args:
        patch: (N, h, w) floating point, array or tensor.
        size: side of the map, or (H, W).
        align_corners: as in `torch.nn.functional.interpolate`.
        sigma: standard deviation in pixels of the result, see `smooth`; 0 leaves the interpolation as it is.

    Returns:
        (N, H, W) float32, array or tensor as `patch`.

    Raises:
        ValueError: `patch` is not (N, h, w), or `size` or `sigma` is out of range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size {size}: a map has at least one pixel on each side")
    shape = _check(patch, sigma).shape
    left = _bilinear(shape[1], height, align_corners)
    right = _bilinear(shape[2], width, align_corners)
    return _apply(patch, _gaussian(height, sigma) @ left, _gaussian(width, sigma) @ right)


def smooth(maps: Array, sigma: float = 4.0) -> Array:
    """Smooth maps with a Gaussian, cut at 4 sigma, edges reflected (d c b a | a b c d | d c b a).

    The definition is `scipy.ndimage.gaussian_filter(map, sigma, mode="reflect", truncate=4)` on each map.

    Args:
        maps: (N, H, W) floating point, array or tensor.
        sigma: standard deviation in pixels, >= 0.

    Returns:
        (N, H, W) float32, array or tensor as `maps`.

    Raises:
        ValueError: `maps` is not (N, H, W) or `sigma` is negative.
    """
    shape = _check(maps, sigma).shape
    return _apply(maps, _gaussian(shape[1], sigma), _gaussian(shape[2], sigma))


def image_scores(
    patch: Array,
    reduce: str = "max",
    *,
    size: int | tuple[int, int] = 256,
    sigma: float = 0.0,
    align_corners: bool = False,
    fraction: float = 0.01,
) -> Array:
    """Reduce patch scores to one score per image.

    Args:
        patch: (N, h, w) floating point, array or tensor.
        reduce: "max" over patches (PatchCore's reference program, patchcore.py:213-218); "map_max" over the
            pixels of the upsampled map (HierCore 3.3; MuSc, musc.py:240); "top", the mean of the highest
            patches (MeDS, data selection).
        size: "map_max": side of the map, or (H, W).
        sigma: "map_max": smoothing; 0, because HierCore's text names interpolation only.
        align_corners: "map_max": see `upsample`.
        fraction: "top": share of the patches, rounded up (MeDS's program rounds down: 7 of 784, not 8).

    Returns:
        (N,) float32, array or tensor as `patch`.

    Raises:
        ValueError: an unknown `reduce`, a `fraction` outside (0, 1], or `patch` is not (N, h, w).
    """
    values = _check(patch, sigma)
    if reduce == "max":
        result = values.amax((1, 2)).float()
    elif reduce == "map_max":
        height, width = (size, size) if isinstance(size, int) else size
        step = max(1, CHUNK_PIXELS // (height * width))
        options = {"size": (height, width), "sigma": sigma, "align_corners": align_corners}
        parts = [upsample(part, **options).amax((1, 2)) for part in values.split(step)]
        result = torch.cat(parts) if len(values) else values.new_zeros(0, dtype=torch.float32)
    elif reduce == "top":
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction {fraction}: a share of the patches lies in (0, 1]")
        flat = values.flatten(1)
        result = flat.topk(math.ceil(fraction * flat.shape[1]), dim=1).values.float().mean(1)
    else:
        raise ValueError(f'reduce {reduce!r}: choose "max", "map_max" or "top"')
    return result.numpy() if isinstance(patch, np.ndarray) else result


def _tensor(maps: np.ndarray | torch.Tensor) -> torch.Tensor:
    return maps if isinstance(maps, torch.Tensor) else torch.from_numpy(np.require(maps, requirements="W"))


def _check(maps: np.ndarray | torch.Tensor, sigma: float) -> torch.Tensor:
    values = _tensor(maps)
    if values.ndim != 3 or 0 in values.shape[1:] or not values.is_floating_point():
        raise ValueError(f"maps: shape {tuple(values.shape)}, {values.dtype}; expected (N, h, w) floating point")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma {sigma}: a standard deviation in pixels is 0 or more")
    return values


def _apply(maps: Array, left: torch.Tensor, right: torch.Tensor) -> Array:
    """Return left @ map @ right.T for every map, float32."""
    values = _tensor(maps)
    left, right = left.to(values.device, torch.float32), right.to(values.device, torch.float32)
    result = torch.empty(len(values), len(left), len(right), device=values.device)
    step = max(1, CHUNK_PIXELS // result[:1].numel()) if len(values) else 1
    for start in range(0, len(values), step):
        part = values[start : start + step].float()
        torch.matmul(left @ part, right.T, out=result[start : start + step])
    return result.numpy() if isinstance(maps, np.ndarray) else result


def _bilinear(source: int, target: int, align_corners: bool) -> torch.Tensor:
    """Return the (target, source) float64 matrix of linear interpolation along one axis."""
    place = torch.arange(target, dtype=torch.float64)
    if align_corners:
        place *= (source - 1) / (target - 1) if target > 1 else 0.0
    else:
        place = ((place + 0.5) * source / target - 0.5).clamp_(min=0)
    low = place.long().clamp_(max=source - 1)
    weight = place - low
    matrix = torch.zeros(target, source, dtype=torch.float64)
    rows = torch.arange(target)
    matrix.index_put_((rows, low), 1 - weight, accumulate=True)
    matrix.index_put_((rows, (low + 1).clamp_(max=source - 1)), weight, accumulate=True)
    return matrix


def _gaussian(size: int, sigma: float) -> torch.Tensor:
    """Return the (size, size) float64 matrix of Gaussian smoothing along one axis."""
    radius = int(4 * sigma + 0.5)
    if radius == 0:
        return torch.eye(size, dtype=torch.float64)
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offset / sigma).double() ** 2)
    source = (torch.arange(size)[:, None] + offset) % (2 * size)  # reflection repeats after 2 * size
    source = torch.where(source < size, source, 2 * size - 1 - source)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(
        1, source, (kernel / kernel.sum()).expand(size, -1)
    )
