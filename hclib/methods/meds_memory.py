"""Stage 1 of MeDS: scores under many sparse memories, from one tensor of patch-to-image distances.

After Safarov et al., "Memory-Distilled Selection for Noise-Robust Anomaly Detection" (ICML 2026), section 4.1 and
appendix B.2. A memory holds all patches of a few drawn images, so a patch's distance to it is the least of its
distances to those images: B memories are B minima over columns, and no search is done twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from hclib.kernels.distances import patch_to_image, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores

HELD = 1 << 24  # distances of one block: 64 MB
ON_DISK = 1 << 27  # distances beyond which the tensor is a temporary file: 512 MB


def draw_size(images: int, ratio: float) -> int:
    """Return how many of `images` a memory holds, ceil(ratio * images), safe against 0.1 * 70 = 7.000000000000001.

    Raises:
        ValueError: no images, or `ratio` outside (0, 1].
    """
    if images < 1 or not 0 < ratio <= 1:
        raise ValueError(f"images={images}, ratio={ratio}: a memory holds a share in (0, 1] of at least one image")
    return math.ceil(round(ratio * images, 9))


def draw_images(
    images: int, ratio: float = 0.1, ensembles: int = 100, seed: int = 0, *, replacement: bool = True
) -> torch.Tensor:
    """Draw the images of every memory.

    The draws are nested: with the same seed a larger ratio or ensemble begins with those of a smaller one.

    Args:
        images: N.
        ratio: share of the images in a memory, m = ceil(ratio * N).
        ensembles: memories B.
        seed: of the draws.
        replacement: draw with replacement (the program for MVTec AD and VisA) or without (for Real-IAD).

    Returns:
        (B, m) int64.
    """
    size = draw_size(images, ratio)
    if ensembles < 1:
        raise ValueError(f"ensembles={ensembles}: at least one memory is needed")
    rows = []
    for number in range(ensembles):
        rng = np.random.default_rng([seed, number])
        rows.append(rng.integers(images, size=size) if replacement else rng.permutation(images)[:size])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def bootstrap_scores(
    distances: torch.Tensor | np.ndarray,
    ratio: float = 0.1,
    ensembles: int = 100,
    seed: int = 0,
    *,
    replacement: bool = True,
) -> torch.Tensor:
    """Average, over bootstrapped memories, every patch's distance to the nearest patch in memory (Eqs. 1 and 5).

    Equal, for the same draws, to building each memory from the patches of its images and searching it.

    Args:
        distances: (N, P, Nr) floating point, tensor or (memory-mapped) array: distance of every patch to its nearest
            patch in each of Nr images, as from `patch_to_image`, or any increasing function of it.
        ratio: share of the images in a memory, m = ceil(ratio * Nr).
        ensembles: memories B.
        seed: of the draws.
        replacement: draw with replacement or without.

    Returns:
        (N, P) float32 in the unit of `distances`, on its device. Beside it, about 200 MB are held.

    Raises:
        ValueError: `distances` has another shape or dtype, or an option is out of range.

    Source: MeDS, Eq. 5 and appendix B.2; program, step_1:184-190 (with replacement).
    """
    distances = _distances(distances)
    drawn = draw_images(distances.shape[2], ratio, ensembles, seed, replacement=replacement).to(distances.device)
    result = torch.empty(distances.shape[:2], device=distances.device)
    step = max(1, HELD // distances[:1].numel()) if len(distances) else 1
    for start in range(0, len(distances), step):
        columns = distances[start : start + step].flatten(0, 1).T.float().contiguous()  # (Nr, n * P)
        total = torch.zeros(columns.shape[1], dtype=torch.float64, device=columns.device)
        for images in drawn:
            total += columns[images.unique()].amin(0)
        result[start : start + step] = (total / ensembles).view(-1, distances.shape[1])
    return result


def limit_weights(images: int, ratio: float = 0.1, *, replacement: bool = True) -> torch.Tensor:
    """Return the probability that the k-th nearest of N images is the nearest drawn one, k = 1..N.

    With m draws, the k nearest are all missed with probability S_k: ((N - k) / N)^m with replacement,
    C(N - k, m) / C(N, m) without; the weight is S_(k-1) - S_k.

    Returns:
        (N,) float64, sum 1.
    """
    size = draw_size(images, ratio)
    left = torch.arange(images, -1, -1, dtype=torch.float64)  # N - k for k = 0..N
    if replacement:
        survival = (left / images) ** size
    else:
        factors = ((left[:-1] - size) / left[:-1]).clamp(min=0)
        survival = torch.cat([torch.ones(1, dtype=torch.float64), factors.cumprod(0)])
    return survival[:-1] - survival[1:]


@torch.no_grad()
def bootstrap_limit(
    distances: torch.Tensor | np.ndarray, ratio: float = 0.1, *, replacement: bool = True
) -> torch.Tensor:
    """Compute what `bootstrap_scores` tends to for infinitely many memories: exact, and without a seed.

    Args:
        distances: (N, P, Nr) floating point, tensor or (memory-mapped) array.
        ratio: share of the images in a memory.
        replacement: draws with replacement or without.

    Returns:
        (N, P) float32: the distances in ascending order, weighted by `limit_weights`.

    Raises:
        ValueError: `distances` has another shape or dtype, or `ratio` is out of range.

    Source: ours (the expectation in MeDS, Eq. 6, over draws of images).
    """
    distances = _distances(distances)
    weights = limit_weights(distances.shape[2], ratio, replacement=replacement).to(distances.device)
    result = torch.empty(distances.shape[:2], device=distances.device)
    step = max(1, HELD // 4 // distances[:1].numel()) if len(distances) else 1
    for start in range(0, len(distances), step):
        ascending = distances[start : start + step].sort(dim=2).values.double()
        result[start : start + step] = ascending @ weights
    return result


def _distances(distances: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(distances, np.ndarray):
        distances = torch.from_numpy(np.require(distances, requirements="W"))
    if distances.ndim != 3 or 0 in distances.shape[1:] or not distances.is_floating_point():
        shape, dtype = tuple(distances.shape), distances.dtype
        raise ValueError(f"distances: shape {shape}, {dtype}; expected (N, P, Nr) floating point")
    return distances


def memory_patches(features: Features, rows: np.ndarray, layers: Sequence[str]) -> torch.Tensor:
    """Return patches as stage 1 compares them: each layer L2-normalised, layers joined, length 1 in all.

    Half the squared distance of two such patches is 1 - cos, averaged over the layers.

    Returns:
        (n, P, C) float32.
    """
    parts = [torch.from_numpy(np.asarray(features.maps[layer][rows], np.float32)).flatten(1, 2) for layer in layers]
    return torch.cat([F.normalize(part, dim=2) for part in parts], 2) / math.sqrt(len(layers))


@torch.no_grad()
def memory_scores(
    queries: torch.Tensor,
    references: torch.Tensor,
    *,
    distance: str = "cosine",
    ratio: float = 0.1,
    ensembles: int | None = 100,
    seed: int = 0,
    replacement: bool = True,
) -> torch.Tensor:
    """Score patches under the memories of some images: distances once, then `bootstrap_scores` or its limit.

    Args:
        queries: (N, P, C) from `memory_patches`.
        references: (Nr, R, C); give the very tensor `queries` to score training images under their own memories. A
            drawn image is then at distance 0 from itself, as in the program.
        distance: "cosine", 1 - cos (the program), or "l2" (Eq. 1).
        ratio: share of the images in a memory.
        ensembles: memories; None for infinitely many.
        seed: of the draws.
        replacement: draw with replacement or without.

    Returns:
        (N, P) float32 on the device of `queries`. The (N, P, Nr) distances are a temporary file beyond 512 MB.
    """
    if distance not in ("cosine", "l2"):
        raise ValueError(f'memory_distance={distance!r}: choose "cosine" or "l2"')
    shape = (len(queries), queries.shape[1], len(references))
    with tempfile.TemporaryFile() as file:
        out = None
        if math.prod(shape) > ON_DISK:
            out = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
        tensor = patch_to_image(queries, references, out=out)
        if distance == "cosine":
            for image in tensor:  # one at a time: the tensor may be a file
                image.square_().mul_(0.5)
        if ensembles is None:
            return bootstrap_limit(tensor, ratio, replacement=replacement).to(queries.device)
        return bootstrap_scores(tensor, ratio, ensembles, seed, replacement=replacement).to(queries.device)


def memory_layers(features: Features, asked: Sequence[str] | None) -> list[str]:
    """Return the layers that the memory compares: those asked for, or "norm" where there is one, or all."""
    layers = list(asked or (["norm"] if "norm" in features.maps else features.maps))
    missing = [layer for layer in layers if layer not in features.maps]
    if missing:
        raise ValueError(f"memory layer {missing[0]!r} is not among the features' {list(features.maps)}")
    return layers


class BootstrappedMemory:
    """Stage 1 as a detector: the row "memory ensemble" of MeDS, Tables 4 and 5.

    Test patches are compared with the training images of their own class; where classes are not given, all training
    images are one group.

    Args:
        memory_layers: layers that are compared; None for "norm" where there is one, else all.
        memory_distance: "cosine" (1 - cos) or "l2".
        ratio, ensembles, replacement, seed: as in `draw_images`; `ensembles=None` for the closed form.
        percent: share of the highest patch scores, in percent, whose mean is the image score.
        sigma: Gaussian smoothing of the pixel maps in pixels.
        device: "auto", "cpu", "cuda" or a torch device.
    """

    def __init__(
        self,
        *,
        memory_layers: Sequence[str] | None = None,
        memory_distance: str = "cosine",
        ratio: float = 0.1,
        ensembles: int | None = 100,
        replacement: bool = True,
        percent: float = 1.0,
        sigma: float = 4.0,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        self.layers, self.percent, self.sigma = memory_layers, percent, sigma
        self.options = {"distance": memory_distance, "ratio": ratio, "ensembles": ensembles}
        self.options |= {"replacement": replacement, "seed": seed}
        self.device = resolve_device(device)
        self.train: Features | None = None
        self.groups: list[str] = []

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Keep the training features; memories are drawn when scoring."""
        if len(train) == 0:
            raise ValueError("no training image: a memory needs at least one")
        self.train, self.groups = train, list(labels) if labels is not None else [""] * len(train)
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images; `labels` are needed where `fit` had them.

        Raises:
            RuntimeError: if the detector was not fitted.
            ValueError: a class without training images, or labels given to one of `fit` and `score` only.
        """
        if self.train is None:
            raise RuntimeError("the memory has no training images yet: call fit(train) first")
        asked = np.array(list(labels) if labels is not None else [""] * len(test), dtype=object)
        known, layers = np.array(self.groups, dtype=object), memory_layers(self.train, self.layers)
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"label {unknown[0]!r}: no training image has it; known are {sorted(set(known))}")
        h, w = next(iter(test.maps.values())).shape[1:3]
        patch, group = np.zeros((len(test), h, w), np.float32), np.zeros(len(test), np.int64)
        for number, name in enumerate(sorted(set(known))):
            rows = np.flatnonzero(asked == name)
            if len(rows):
                parts = ((test, rows), (self.train, np.flatnonzero(known == name)))
                queries, references = (memory_patches(f, r, layers).to(self.device) for f, r in parts)
                patch[rows] = memory_scores(queries, references, **self.options).cpu().view(-1, h, w).numpy()
                group[rows] = number
        image = image_scores(patch, "top", fraction=self.percent / 100)
        return Scores(patch, image, group, self.sigma, align_corners=True)
