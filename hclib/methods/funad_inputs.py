"""What FUN-AD's network sees: an image's token joined with each of its patches, normalised, perhaps reduced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from hclib.kernels.features import Features

SAMPLE = 20000  # patches that the principal components are computed from, at most
BLOCK = 64  # images read at a time


@dataclass
class Preparation:
    """How a patch becomes the network's input: layer-normalised token and patch, centred, projected.

    Attributes:
        mean: (D,) float32, the training mean of the joined vectors.
        basis: (D, C) float32, principal components, or an empty tensor for all channels.
        scale: scalar float32 tensor; the inputs' root mean square over channels and patches is 1.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    @property
    def channels(self) -> int:
        """Width of an input."""
        return self.basis.shape[1] if self.basis.numel() else len(self.mean)

    @classmethod
    def learn(cls, train: Features, width: int | None, seed: int) -> Self:
        """Learn mean, components and scale from up to `SAMPLE` patches of the training images.

        Raises:
            ValueError: `width` is not between 1 and the channels of a joined vector.
        """
        generator = np.random.default_rng([seed, 1])
        images = np.sort(generator.permutation(len(train))[: max(1, SAMPLE // 64)])
        rows = torch.cat([join(train, images[i : i + BLOCK]) for i in range(0, len(images), BLOCK)]).flatten(0, 1)
        rows = rows[torch.from_numpy(np.sort(generator.permutation(len(rows))[:SAMPLE]))].double()
        mean = rows.mean(0)
        rows -= mean
        basis = rows.new_zeros(0)
        if width is not None:
            if not 1 <= width <= len(mean):
                raise ValueError(f"width={width}: the joined vectors have {len(mean)} channels")
            basis = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -width:].flip(1)
            top = basis.abs().argmax(0)
            basis = basis * basis[top, torch.arange(width)].sign()  # a component's sign is arbitrary: fix it
            rows = rows @ basis
        scale = rows.square().mean().sqrt().clamp(min=1e-12)
        return cls(mean.float(), basis.float().contiguous(), scale.float())

    def __call__(self, joined: torch.Tensor) -> torch.Tensor:
        """Return inputs (..., C) of joined vectors (..., D)."""
        centred = joined - self.mean
        return (centred @ self.basis if self.basis.numel() else centred) / self.scale

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the parts by name, to be stored."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}


def join(features: Features, rows: np.ndarray) -> torch.Tensor:
    """Join each image's token with its patches of the last layer, both layer-normalised.

    The program takes token and patches after the encoder's last norm (feature_extract.py:21-40), where both have one
    scale; a layer norm without weights gives them one here, whatever the layer.

    Returns:
        (n, P, D) float32 on the CPU, D = token width + channels.
    """
    maps = list(features.maps.values())[-1]
    patches = torch.from_numpy(np.asarray(maps[rows], dtype=np.float32)).flatten(1, 2)  # (n, P, C)
    tokens = torch.from_numpy(np.asarray(features.tokens[rows], dtype=np.float32))[:, None]
    tokens = F.layer_norm(tokens, tokens.shape[2:]).expand(-1, patches.shape[1], -1)
    return torch.cat([tokens, F.layer_norm(patches, patches.shape[2:])], 2)


class Inputs:
    """The network's inputs for the images of one or more Features, read when asked for or, when narrow, kept.

    `inputs[rows]` gives (n * P, C) for image rows, `at(numbers)` (n, C) for patch numbers (row * P + patch).

    Args:
        parts: Features with the same grid and layers; their images follow each other.
        preparation: what makes inputs of joined vectors.
        device: where inputs are given.
        keep: hold all inputs in memory when they are reduced to principal components.
    """

    def __init__(
        self, parts: Sequence[Features], preparation: Preparation, device: torch.device, *, keep: bool = True
    ) -> None:
        grids = {tuple(list(part.maps.values())[-1].shape[1:3]) for part in parts}
        if len(grids) > 1:
            raise ValueError(f"features with different grids {sorted(grids)} cannot be trained on together")
        self.grid = grids.pop()
        self.patches, self.channels = self.grid[0] * self.grid[1], preparation.channels
        self.parts, self.preparation, self.device = list(parts), preparation, device
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._kept: torch.Tensor | None = None
        if keep and preparation.basis.numel():
            self._kept = torch.cat([self._read(rows) for rows in torch.arange(len(self)).split(BLOCK)]).to(device)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._kept is not None:
            return self._kept[rows.to(self.device)].flatten(0, 1)
        return self._read(rows).to(self.device).flatten(0, 1)

    def at(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the inputs (n, C) of patches given by ascending numbers (n,), block by block of images."""
        if self._kept is not None:
            return self._kept.flatten(0, 1)[numbers.to(self.device)]
        images, found = (numbers // self.patches).unique(return_inverse=True)
        result = torch.empty(len(numbers), self.channels, device=self.device)
        for start in range(0, len(images), BLOCK):
            inside = (found >= start) & (found < start + BLOCK)
            block = self._read(images[start : start + BLOCK]).to(self.device)
            result[inside] = block[found[inside] - start, numbers[inside] % self.patches]
        return result

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        """Return inputs (n, P, C) of image rows, on the CPU."""
        wanted = rows.numpy()
        part = np.searchsorted(self._starts, wanted, side="right") - 1
        result = torch.empty(len(wanted), self.patches, self.channels)
        for k in np.unique(part):
            mine = np.flatnonzero(part == k)
            result[torch.from_numpy(mine)] = self.preparation(join(self.parts[k], wanted[mine] - self._starts[k]))
        return result
