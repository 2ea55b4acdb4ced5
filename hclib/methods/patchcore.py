"""PatchCore: one memory bank of normal patches, reduced to a coreset; a patch's score is its distance to the bank.

After Roth et al., "Towards total recall in industrial anomaly detection" (CVPR 2022). What the paper leaves open
follows the reference program; each choice that changes numbers is an option whose default is stated below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from hclib.kernels.coreset import greedy_coreset, random_coreset, random_projection
from hclib.kernels.distances import resolve_device
from hclib.kernels.features import Features, local_patches
from hclib.kernels.maps import Scores, image_scores
from hclib.kernels.memory import MemoryBank
from hclib.methods.state import load_state, save_state

BLOCK = 64  # images whose patches are held at a time


def patch_blocks(features: Features, *, dim: int = 1024, patch_size: int = 3) -> Iterator[torch.Tensor]:
    """Yield the local patches of `features`, `BLOCK` images at a time, in row order.

    Yields:
        `(n, h, w, C)` float32 on the CPU, n <= `BLOCK`; the whole set is never in memory.
    """
    for start in range(0, len(features), BLOCK):
        rows = slice(start, min(start + BLOCK, len(features)))
        yield local_patches(features, rows, dim=dim, patch_size=patch_size)


def build_bank(
    features: Features,
    *,
    ratio: float = 0.1,
    sampler: str = "greedy",
    projection: int | None = 128,
    dim: int = 1024,
    patch_size: int = 3,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> MemoryBank:
    """Build the coreset memory bank of every patch in `features` (Eqs. 3 and 4 of HierCore, section 3.2 of PatchCore).

    Two streamed passes: the first keeps only the randomly projected patches (P x `projection` float32, the peak), on
    which the coreset is chosen; the second gathers the chosen patches at full width.

    Args:
        features: Features of N normal images, P = N*h*w patches.
        ratio: share of patches kept, `max(1, int(P * ratio))`; 1.0 keeps all.
        sampler: "greedy" (exact farthest-first k-center from a seeded first patch) or "random".
        projection: width of the random projection for the coreset distances; None measures them at full width.
        dim: width of the patch embedding of a CNN encoder.
        patch_size: side of the neighbourhood that a patch is averaged over.
        seed: seeds the projection and the first (or every) pick.
        device: where distances are computed.

    Returns:
        The bank: `(M, C)` float32 rows in the order in which they were picked.

    Raises:
        ValueError: if `features` is empty, `ratio` is outside (0, 1] or `sampler` is unknown.
    """
    if len(features) == 0:
        raise ValueError("a memory bank needs at least one training image, got none")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: the coreset keeps a share of the patches in (0, 1]")
    if sampler not in ("greedy", "random"):
        raise ValueError(f'sampler={sampler!r}: choose "greedy" or "random"')
    device = resolve_device(device)
    options = {"dim": dim, "patch_size": patch_size}
    if ratio == 1:
        return MemoryBank(torch.cat([block.flatten(0, 2) for block in patch_blocks(features, **options)]), device)

    generator = np.random.default_rng(seed)
    first_seed, projection_seed = (int(s) for s in generator.integers(2**31, size=2))
    if sampler == "random":
        count = sum(block.shape[:3].numel() for block in patch_blocks(features, **options))
        chosen = random_coreset(count, max(1, int(count * ratio)), seed=first_seed)
    else:
        blocks = (block.flatten(0, 2) for block in patch_blocks(features, **options))
        if projection is not None:
            blocks = (random_projection(block, projection, seed=projection_seed) for block in blocks)
        points = torch.cat(list(blocks)).to(device)  # (P, projection)
        first = int(np.random.default_rng(first_seed).integers(len(points)))
        chosen = greedy_coreset(points, max(1, int(len(points) * ratio)), first=first).cpu()
        del points
    return MemoryBank(_gather(features, chosen, options), device)


def _gather(features: Features, chosen: torch.Tensor, options: dict) -> torch.Tensor:
    """Return the patches with the flat indices `chosen` (M,), in that order, as `(M, C)` float32."""
    order = torch.argsort(chosen)
    ascending, kept, offset = chosen[order], [], 0
    for block in patch_blocks(features, **options):
        block = block.flatten(0, 2)
        low, high = torch.searchsorted(ascending, torch.tensor([offset, offset + len(block)])).tolist()
        kept.append(block[ascending[low:high] - offset])
        offset += len(block)
    kept = torch.cat(kept)
    points = torch.empty_like(kept)
    points[order] = kept
    return points


def score_patches(
    bank: MemoryBank,
    features: Features,
    *,
    neighbors: int = 1,
    squared: bool = False,
    dim: int = 1024,
    patch_size: int = 3,
) -> np.ndarray:
    """Score every patch by its mean distance to its `neighbors` nearest bank entries.

    Returns:
        `(N, h, w)` float32, L2 (or squared L2) distances.
    """
    blocks = []
    for block in patch_blocks(features, dim=dim, patch_size=patch_size):
        distances, _ = bank.search(block.flatten(0, 2), k=neighbors)  # squared L2
        distances = torch.as_tensor(distances)
        values = distances if squared else distances.clamp_min(0).sqrt()
        blocks.append(values.mean(1).reshape(block.shape[:3]).float().cpu().numpy())
    return np.concatenate(blocks)


class PatchCore:
    """One global memory bank; class labels are never used.

    The defaults are the HierCore paper's for its PatchCore baseline where it states them (coreset ratio 0.1, L2, one
    neighbour) and the reference program's elsewhere (128-d random projection, image score = maximum over patches
    before upsampling). The reference program reports *squared* L2: `squared=True`. Neither re-weights scores.

    Args:
        ratio: coreset ratio.
        neighbors: bank neighbours averaged per patch.
        squared: report squared L2 instead of L2. Ranks of one-neighbour scores are the same, thresholds are not.
        sigma: Gaussian smoothing of the pixel maps in pixels, as in the reference program; image scores do not use it.
        image_score: "max" over patches (reference program) or "map_max", the maximum of the map (HierCore 3.3).
        sampler: "greedy" or "random" coreset.
        projection: width of the random projection inside the coreset, None for none.
        dim: embedding width for CNN encoders.
        patch_size: neighbourhood of a local patch.
        seed: seeds projection and coreset.
        device: "auto", "cpu", "cuda" or a torch device.
    """

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        neighbors: int = 1,
        squared: bool = False,
        sigma: float = 4.0,
        image_score: str = "max",
        sampler: str = "greedy",
        projection: int | None = 128,
        dim: int = 1024,
        patch_size: int = 3,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        self.bank_options = {
            "ratio": ratio,
            "sampler": sampler,
            "projection": projection,
            "dim": dim,
            "patch_size": patch_size,
            "seed": seed,
        }
        self.score_options = {"neighbors": neighbors, "squared": squared, "dim": dim, "patch_size": patch_size}
        self.image_score, self.sigma = image_score, sigma
        self.device = str(device)
        self.bank: MemoryBank | None = None

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Build the bank from all training images; `labels` are accepted and ignored."""
        self.bank = build_bank(train, **self.bank_options, device=self.device)
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images; `labels` are accepted and ignored.

        Returns:
            Scores with `group` 0 for every image: there is one bank.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
        """
        if self.bank is None:
            raise RuntimeError("PatchCore has no memory bank yet: call fit(train) or PatchCore.load(folder) first")
        patch = score_patches(self.bank, test, **self.score_options)
        return Scores(patch, image_scores(patch, self.image_score), np.zeros(len(patch), np.int64), self.sigma)

    def save(self, folder: str | Path) -> None:
        """Write options (JSON) and bank (safetensors) to `folder`; a loaded copy gives the same scores bit for bit."""
        if self.bank is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        save_state(folder, "PatchCore", self._options(), {"bank": self.bank.points})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote."""
        options, tensors = load_state(folder, "PatchCore")
        detector = cls(**options, device=device)
        detector.bank = MemoryBank(tensors["bank"], resolve_device(device))
        return detector

    def _options(self) -> dict:
        return {**self.bank_options, **self.score_options, "image_score": self.image_score, "sigma": self.sigma}
