"""SoftPatch: a memory bank without the patches that are outliers at their position, and scores weighted by the rest.

After Jiang et al., "SoftPatch: Unsupervised anomaly detection with noisy data" (NeurIPS 2022). The paper's text is not
at hand: what is done here follows the notes on the authors' program (commit f8dc3e0); files with lines are its.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from hclib.kernels.coreset import greedy_coreset, random_projection
from hclib.kernels.distances import full_precision, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.kernels.memory import MemoryBank
from hclib.methods.patchcore import _gather, patch_blocks
from hclib.methods.state import load_state, save_state

SPARE = 8  # candidates beyond k whose distances are evaluated directly, so that rounding decides no neighbour
HELD = 1 << 23  # values of one block: 32 MB in single precision
TINY = 1e-10  # added to the mean reachability, as scikit-learn does


@torch.no_grad()
def outlier_weights(patches: torch.Tensor, neighbors: int = 5) -> torch.Tensor:
    """Compute the local outlier factor of every patch among the patches at its position in the other images.

    The factor is the mean local reachability density of a patch's k nearest neighbours over its own: about 1 inside
    a cloud, large outside of it. Equal to `-LocalOutlierFactor(n_neighbors=k).fit(x).negative_outlier_factor_` of
    scikit-learn for each position x; all positions of a block are worked on together. Neighbours are chosen with k + 8
    candidates from a float32 product and settled by distances that are evaluated directly.

    Args:
        patches: (P, N, C) floating point: P positions, N images.
        neighbors: k; N - 1 where there are fewer other images. 5 is what the authors' program always uses, whatever
            is asked of it (softpatch.py:39-43); their paper and its command line say 6.

    Returns:
        (P, N) float64 on the device of `patches`; beside it, about 100 MB are held.

    Raises:
        ValueError: `patches` is not (P, N, C) floating point or not finite, holds fewer than 2 images, or `neighbors`
            is below 1.

    Source: Breunig et al., "LOF" (SIGMOD 2000), definitions 5 to 7; SoftPatch's program, softpatch.py:209-292.
    """
    if patches.ndim != 3 or 0 in patches.shape or not patches.is_floating_point():
        raise ValueError(f"patches: shape {tuple(patches.shape)}, {patches.dtype}; expected (P, N, C) floating point")
    positions, images, channels = patches.shape
    if images < 2 or neighbors < 1:
        raise ValueError(f"{images} images, neighbors={neighbors}: an outlier needs 2 images and 1 neighbour at least")
    k = min(neighbors, images - 1)
    step = max(1, HELD // (images * max(images, k * channels)))
    result = torch.empty(positions, images, dtype=torch.float64, device=patches.device)
    with full_precision(patches.device):
        for start in range(0, positions, step):
            result[start : start + step] = _local_outlier_factors(patches[start : start + step], k)
    if not torch.isfinite(result).all():
        position, image = (~torch.isfinite(result)).nonzero()[0].tolist()
        raise ValueError(f"patches: NaN, infinity or values too large to square around position {position}, {image}")
    return result


def _local_outlier_factors(points: torch.Tensor, k: int) -> torch.Tensor:
    """Return the factors (p, N) of (p, N, C)."""
    distances, indices = _neighbours(points, k)  # (p, N, k)
    reach = torch.maximum(distances, _at(distances[:, :, -1], indices))
    density = 1 / (reach.mean(2) + TINY)  # (p, N)
    return _at(density, indices).mean(2) / density


def _at(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return values (p, N) at indices (p, N, k)."""
    return values.gather(1, indices.flatten(1)).view(indices.shape)


def _neighbours(points: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L2 distances, as float64, and indices (p, N, k) of the k nearest other points, nearest first."""
    count, images, channels = points.shape
    centred = (points - points.mean(1, keepdim=True)).float()
    norms = torch.linalg.vecdot(centred, centred)[:, None]  # (p, 1, N)
    distances = torch.empty(count, images, k, dtype=torch.float64, device=points.device)
    indices = torch.empty(count, images, k, dtype=torch.int64, device=points.device)
    keep = min(k + SPARE, images - 1)
    step = max(1, HELD // (count * max(images, keep * channels)))
    for start in range(0, images, step):
        rows = torch.arange(start, min(start + step, images), device=points.device)
        squared = torch.baddbmm(norms, centred[:, rows], centred.transpose(1, 2), alpha=-2)  # (p, r, N)
        squared[:, rows - start, rows] = torch.inf
        found = squared.topk(keep, dim=2, largest=False).indices.sort(dim=2).values  # (p, r, m)
        picked = points.gather(1, found.flatten(1)[:, :, None].expand(-1, -1, channels)).view(*found.shape, channels)
        exact = torch.linalg.vector_norm(picked.sub_(points[:, rows, None]), dim=3)
        exact, order = exact.sort(dim=2, stable=True)
        distances[:, rows], indices[:, rows] = exact[:, :, :k].double(), found.gather(2, order[:, :, :k])
    return distances, indices


class SoftPatch:
    """One memory bank; the training patches with the highest outlier factors are left out of it.

    Training: the local outlier factor of every patch among all images' patches at its position, on a random
    projection; the share `threshold` of patches with the highest factors is rejected (softpatch.py:197-200); a greedy
    coreset of the rest. The program gives rejected patches the sampling weight 0, which lets one of them be the first
    pick; here they are removed before sampling, so that none can be. Scoring: the distance to the nearest bank entry
    times that entry's factor. Labels are never used.

    Args:
        threshold: share of patches rejected.
        neighbors: neighbours k of the outlier factor. The paper says 6; the program always uses 5.
        ratio: coreset size as a share of *all* patches, at most all that were kept.
        squared: weight the squared L2 distance (the program) or, False, the L2 distance.
        sigma: Gaussian smoothing of the pixel maps in pixels.
        image_score: "max" over patches (program) or "map_max".
        projection: width of the random projection for factors and coreset; None for none.
        dim: embedding width for CNN encoders.
        patch_size: neighbourhood of a local patch.
        seed: seeds projection and coreset.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        bank: the memory bank (M entries), and `bank_weights` (M,) their factors.
        weights: (N, h, w) float32, the factors of the training patches (absent after `load`).
        limit: the factor above which a patch was rejected.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.15,
        neighbors: int = 6,
        ratio: float = 0.1,
        squared: bool = True,
        sigma: float = 4.0,
        image_score: str = "max",
        projection: int | None = 128,
        dim: int = 1024,
        patch_size: int = 3,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        if not 0 <= threshold < 1 or not 0 < ratio <= 1:
            raise ValueError(f"threshold={threshold}, ratio={ratio}: reject a share in [0, 1), keep one in (0, 1]")
        self.threshold, self.neighbors, self.ratio, self.squared = threshold, neighbors, ratio, squared
        self.sigma, self.image_score = sigma, image_score
        self.projection, self.patch_options = projection, {"dim": dim, "patch_size": patch_size}
        self.seed, self.device = seed, str(device)
        self.bank: MemoryBank | None = None
        self.bank_weights: torch.Tensor | None = None
        self.weights: np.ndarray | None = None
        self.limit = float("nan")

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Weigh all training patches and build the bank; `labels` are accepted and ignored.

        Raises:
            ValueError: fewer than two training images.
        """
        if len(train) < 2:
            raise ValueError(f"{len(train)} training images: outliers are told from other images, give 2 or more")
        projection_seed, first_seed = (int(s) for s in np.random.default_rng(self.seed).integers(2**31, size=2))
        parts = []
        for block in patch_blocks(train, **self.patch_options):
            flat = block.flatten(0, 2)
            flat = flat if self.projection is None else random_projection(flat, self.projection, seed=projection_seed)
            parts.append(flat.view(*block.shape[:3], -1))
        points = torch.cat(parts).to(resolve_device(self.device))  # (N, h, w, d)
        del parts
        weights = outlier_weights(points.flatten(1, 2).transpose(0, 1), self.neighbors).T.contiguous()  # (N, P)
        self.weights = weights.float().view(points.shape[:3]).cpu().numpy()
        self.limit = float(np.quantile(weights.cpu().numpy(), 1 - self.threshold))
        kept = (weights.flatten() <= self.limit).nonzero()[:, 0]
        size = min(len(kept), max(1, int(weights.numel() * self.ratio)))
        first = int(np.random.default_rng(first_seed).integers(len(kept)))
        chosen = kept[greedy_coreset(points.flatten(0, 2)[kept], size, first=first)]
        self.bank_weights = weights.flatten()[chosen].float()
        del points
        self.bank = MemoryBank(_gather(train, chosen.cpu(), self.patch_options), self.device)
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images; `labels` are accepted and ignored.

        Returns:
            Scores with `group` 0 for every image.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
        """
        if self.bank is None:
            raise RuntimeError("SoftPatch has no memory bank yet: call fit(train) or SoftPatch.load(folder) first")
        parts = []
        for block in patch_blocks(test, **self.patch_options):
            squared, found = self.bank.search(block.flatten(0, 2))
            values = squared if self.squared else squared.sqrt()
            values = values * self.bank_weights.to(found.device)[found]
            parts.append(values.view(block.shape[:3]).cpu().numpy())
        patch = np.concatenate(parts)
        return Scores(patch, image_scores(patch, self.image_score), np.zeros(len(patch), np.int64), self.sigma)

    def save(self, folder: str | Path) -> None:
        """Write options (JSON), bank and weights (safetensors); a loaded copy gives the same scores bit for bit."""
        if self.bank is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        save_state(folder, "SoftPatch", self._options(), {"bank": self.bank.points, "weights": self.bank_weights})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote."""
        options, tensors = load_state(folder, "SoftPatch")
        detector = cls(**options, device=device)
        detector.bank = MemoryBank(tensors["bank"], resolve_device(device))
        detector.bank_weights = tensors["weights"]
        return detector

    def _options(self) -> dict:
        names = ("threshold", "neighbors", "ratio", "squared", "sigma", "image_score", "projection", "seed")
        return {name: getattr(self, name) for name in names} | self.patch_options
