"""The HVQ-style student: a transformer whose decoder sees only codes from learned codebooks, level upon level.

After Lu et al., "Hierarchical vector quantized transformer for multi-class unsupervised anomaly detection" (NeurIPS
2023). Its program has a set of codebooks and an output head for every class, chosen by the true class label also when
testing, and adds an optimal-transport score; here one set serves all classes, and the score is that of the other
students, so that the student can be trained without labels and within MeDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hclib.methods.students import Block, Student


class Codebook(nn.Module):
    """A set of vectors; each input is replaced by the nearest, and the vectors follow the inputs' running means.

    The first training batch gives the vectors; afterwards counts and sums decay by 0.99 a step.

    Args:
        size: vectors K.
        width: channels.
        decay: of the running means.
    """

    def __init__(self, size: int, width: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))

    def forward(
        self, values: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest codes of (n, P, width), gradients passing straight through, and the commitment loss."""
        points = values.detach().flatten(0, 1)
        learning = self.training and generator is not None
        if learning and not self.counts.any():
            self._start(points, generator)
        chosen = torch.addmm(self.codes.square().sum(1), points, self.codes.T, alpha=-2).argmin(1)
        codes = self.codes[chosen].view_as(values)
        if learning:
            self._follow(points, chosen)
        return values + (codes - values).detach(), F.mse_loss(values, codes)

    def _start(self, points: torch.Tensor, generator: torch.Generator) -> None:
        picks = torch.randint(len(points), (len(self.codes),), generator=generator, device=points.device)
        self.codes.copy_(points[picks])
        self.sums.copy_(self.codes)
        self.counts.fill_(1.0)

    def _follow(self, points: torch.Tensor, chosen: torch.Tensor) -> None:
        member = F.one_hot(chosen, len(self.codes)).to(points.dtype)  # a product instead of atomic additions
        self.counts.mul_(self.decay).add_(member.sum(0), alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(member.T @ points, alpha=1 - self.decay)
        alive = self.counts > 1e-3
        self.codes[alive] = self.sums[alive] / self.counts[alive, None]


class HVQStudent(Student):
    """Encoder, codebook and decoder of `depth` levels; coarse codes enter the finer levels.

    Args:
        codes: vectors in a codebook.
        commitment: weight of the commitment loss, that keeps the encoder near its codes.
        options: of `Student`.
    """

    depth = 4
    rates = (1e-4, 1e-5)

    def __init__(
        self, channels: int, shares: Sequence[int], *, codes: int = 512, commitment: float = 0.25, **options: Any
    ) -> None:
        self.codes, self.commitment = codes, commitment
        super().__init__(channels, shares, **options)

    def build(self) -> None:
        """Make inlet, encoder, codebooks and decoder."""
        width, levels = self.width, range(self.depth)
        self.norm, self.inlet = nn.LayerNorm(self.channels), nn.Linear(self.channels, width)
        self.encoder = nn.ModuleList(Block(width, "softmax") for _ in levels)
        self.fuse = nn.ModuleList(nn.Linear(2 * width, width) for _ in levels[1:])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in levels)
        self.books = nn.ModuleList(Codebook(self.codes, width) for _ in levels)
        self.blocks = nn.ModuleList(Block(width, "softmax") for _ in levels)

    def decode(
        self, inputs: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the decoder blocks' outputs and the weighted commitment loss, averaged over the levels."""
        tokens, encoded = self.inlet(self.norm(inputs)), []
        for block in self.encoder:
            tokens = block(tokens)
            encoded.append(tokens)
        loss, coded = inputs.new_zeros(()), []
        for level in reversed(range(self.depth)):  # the deepest first
            values = encoded[level]
            if coded:
                values = self.fuse[level](torch.cat([values, coded[-1]], 2))
            code, part = self.books[level](self.norms[level](values), generator)
            coded.append(code)
            loss = loss + part / self.depth
        tokens, outputs = coded[0], []
        for block, code in zip(self.blocks, coded, strict=True):
            tokens = block(tokens, code)
            outputs.append(tokens)
        return outputs, self.commitment * loss

    def factors(self, distances: torch.Tensor, share: float) -> None:
        """Return None: every position counts alike."""
