"""Student networks: decoders that rebuild a frozen encoder's features, so that what they cannot rebuild is anomalous.

Three of them, after Guo et al., "Dinomaly" (CVPR 2025), Luo et al., "INP-Former" (CVPR 2025) and Lu et al., "HVQ-Trans"
(NeurIPS 2023); details follow the notes on the authors' programs. All take the encoder's layers in groups and give one
reconstruction a group: targets (n, G, P, C) in, outputs (n, G, P, C) out. The class and register tokens, which Dinomaly
keeps in its decoder, are not among the features and are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HEAD = 64  # channels of an attention head


def linear_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attend with phi(q) phi(k)^T normalised over the keys, phi = elu + 1, in time linear in the number of tokens.

    Args:
        queries: (..., P, d).
        keys: (..., R, d).
        values: (..., R, e).

    Returns:
        (..., P, e).

    Source: Katharopoulos et al., "Transformers are RNNs" (ICML 2020); Dinomaly's program, vision_transformer.py:248-276
    (no scaling by the width of a head).
    """
    queries, keys = F.elu(queries) + 1, F.elu(keys) + 1
    weight = queries @ keys.sum(-2).unsqueeze(-1)  # (..., P, 1)
    return queries @ (keys.transpose(-2, -1) @ values) / weight


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(factors)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def scale_gradient(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return `values` unchanged; their gradient is multiplied by `factors`, which broadcast to them."""
    return _Scale.apply(values, factors)


@torch.no_grad()
def hard_factors(distances: torch.Tensor, share: float, factor: float = 0.1) -> torch.Tensor:
    """Return the gradient factors of Dinomaly's hard mining: `factor` for the share of positions rebuilt best.

    Args:
        distances: (n, P), of outputs to targets.
        share: p; the max(1, int(n * P * (1 - p))) largest distances of the whole batch, and their ties, keep factor 1.
        factor: of the rest.

    Returns:
        (n, P).

    Source: Dinomaly's program, utils.py:70-89.
    """
    keep = max(1, int(distances.numel() * (1 - share)))
    limit = distances.flatten().topk(keep).values[-1]
    return torch.where(distances < limit, factor, 1.0).to(distances.dtype)


@torch.no_grad()
def adaptive_factors(distances: torch.Tensor, power: float = 3.0) -> torch.Tensor:
    """Return INP-Former's gradient factors, (distance / mean distance of the batch)^power, for (n, P) distances."""
    return (distances / distances.mean().clamp(min=1e-12)) ** power


def point_distances(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of outputs and targets (..., C) at every position, (...)."""
    return 1 - F.cosine_similarity(outputs, targets, dim=-1)


def score_map(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction score of every patch: 1 - cos, averaged over the groups; (n, G, P, C) to (n, P)."""
    return point_distances(outputs, targets).mean(1)


def loose_loss(outputs: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Return 1 - cos between an image's whole maps, each flattened to one vector, averaged over images and groups.

    Args:
        outputs: (n, G, P, C), gradients flow into them, scaled by `factors`.
        targets: (n, G, P, C), no gradient.
        factors: (n, G, P), from `hard_factors` or `adaptive_factors` for each group; None for 1.

    Source: Dinomaly's program, utils.py:70-89.
    """
    if factors is not None:
        outputs = scale_gradient(outputs, factors[..., None])
    return (1 - F.cosine_similarity(outputs.flatten(2), targets.detach().flatten(2), dim=2)).mean()


def drop(values: torch.Tensor, share: float, generator: torch.Generator | None) -> torch.Tensor:
    """Set a random share of values to 0 and scale the others up: dropout whose draws come from `generator`."""
    if share == 0 or generator is None:
        return values
    kept = torch.rand(values.shape, generator=generator, device=values.device) >= share
    return values * kept / (1 - share)


class Mlp(nn.Module):
    """Two layers with a GELU between; `share` of input, hidden values and output is dropped while training."""

    def __init__(self, inputs: int, hidden: int, outputs: int, share: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.share = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs), share

    def forward(self, values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Map (..., inputs) to (..., outputs)."""
        share, generator = self.share, generator if self.training else None
        values = F.gelu(self.first(drop(values, share, generator)))
        return drop(self.second(drop(values, share, generator)), share, generator)


class Attention(nn.Module):
    """Multi-head attention of tokens to others.

    Args:
        width: channels; heads of 64 (one where there are fewer).
        kind: "linear" (`linear_attention`), "softmax", or "prototype": ReLU of the cosine of query and key, times a
            learned scale a head, without normalisation over the keys (INP-Former's decoder).
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.heads = kind, max(1, width // HEAD)
        if width % self.heads:
            raise ValueError(f"width={width}: must be a multiple of its {self.heads} heads")
        self.query, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.outlet = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(self.heads, 1, 1)) if kind == "prototype" else None

    def forward(self, tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return (n, P, width) for tokens (n, P, width) and others (n, R, width)."""

        def split(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (n, H, P, d)

        query, keys, values = split(self.query(tokens)), split(self.keys(others)), split(self.values(others))
        if self.kind == "linear":
            mixed = linear_attention(query, keys, values)
        elif self.kind == "softmax":
            mixed = F.scaled_dot_product_attention(query, keys, values)
        else:
            cosine = F.normalize(query, dim=3) @ F.normalize(keys, dim=3).transpose(2, 3)
            mixed = F.relu(cosine * self.scale) @ values
        return self.outlet(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: attention and perceptron, each after a layer norm, with residuals.

    Args:
        width: channels.
        kind: of `Attention`.
        residual: add the tokens to what attention gives (INP-Former's decoder does not).
    """

    def __init__(self, width: int, kind: str, *, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.before, self.between = nn.LayerNorm(width, eps=1e-8), nn.LayerNorm(width, eps=1e-8)
        self.attention, self.mlp = Attention(width, kind), Mlp(width, 4 * width, width)

    def forward(self, tokens: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        """Return (n, P, width); tokens attend to `others`, or to each other."""
        normed = self.before(tokens)
        mixed = self.attention(normed, normed if others is None else self.before(others))
        tokens = tokens + mixed if self.residual else mixed
        return tokens + self.mlp(self.between(tokens))


class Student(nn.Module, ABC):
    """What the students share: layers in groups, decoder outputs reversed and averaged in as many groups.

    Args:
        channels: C of the encoder.
        shares: (G,) layers in each group, which give the mean over all layers that goes into the network.
        width: of the decoder; C by default, otherwise a linear head a group leads back to C.
        depth: blocks of the decoder, at least one a group.
        seed: of the weights: normal with deviation 0.01, cut at 0.03; biases 0 (Dinomaly's program).
    """

    depth = 8
    rates = (2e-3, 2e-4)  # the papers' first and last learning rate

    def __init__(
        self, channels: int, shares: Sequence[int], *, width: int | None = None, depth: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.channels, self.groups = channels, len(shares)
        self.width, self.depth = width or channels, depth or self.depth
        if self.depth < self.groups:
            raise ValueError(f"depth={self.depth}: {self.groups} groups of layers need as many decoder blocks")
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32) / sum(shares), persistent=False)
        plain = self.width == channels
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation, replaced below, leaves no trace
            self.heads = nn.ModuleList(
                nn.Identity() if plain else nn.Linear(self.width, channels) for _ in range(self.groups)
            )
            self.build()
        self._initialise(torch.Generator().manual_seed(seed))

    @abstractmethod
    def build(self) -> None:
        """Make the layers of the network."""

    @abstractmethod
    def decode(
        self, inputs: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the outputs of the decoder's blocks, (n, P, width) each, and an auxiliary loss."""

    @abstractmethod
    def factors(self, distances: torch.Tensor, share: float) -> torch.Tensor | None:
        """Return the gradient factors of one group's distances (n, P), or None."""

    def forward(
        self, targets: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs (n, G, P, C) of targets (n, G, P, C), and the auxiliary loss."""
        inputs = torch.einsum("ngpc,g->npc", targets, self.shares)
        blocks, auxiliary = self.decode(inputs, generator)
        parts = np.array_split(np.arange(len(blocks)), self.groups)  # groups of the reversed blocks
        means = [torch.stack([blocks[-1 - i] for i in part]).mean(0) for part in parts]
        return torch.stack([head(mean) for head, mean in zip(self.heads, means, strict=True)], 1), auxiliary

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, share: float = 0.0) -> torch.Tensor:
        """Return the reconstruction loss; `share` of the positions, those rebuilt best, count less (Dinomaly)."""
        with torch.no_grad():
            distances = point_distances(outputs, targets)  # (n, G, P)
        factors = [self.factors(part, share) for part in distances.unbind(1)]
        return loose_loss(outputs, targets, None if factors[0] is None else torch.stack(factors, 1))

    def _initialise(self, generator: torch.Generator) -> None:
        for name, weight in self.named_parameters():
            if name.endswith(".weight") and weight.ndim == 2:
                nn.init.trunc_normal_(weight, std=0.01, a=-0.03, b=0.03, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif name == "prototypes":
                nn.init.normal_(weight, generator=generator)


class DinomalyStudent(Student):
    """Noisy bottleneck, linear attention, loose loss with gradient discount.

    Args:
        dropout: share dropped of the bottleneck's input, hidden values and output.
        options: of `Student`.
    """

    def __init__(self, channels: int, shares: Sequence[int], *, dropout: float = 0.2, **options: Any) -> None:
        self.dropout = dropout
        super().__init__(channels, shares, **options)

    def build(self) -> None:
        """Make bottleneck and blocks."""
        self.bottleneck = Mlp(self.channels, 4 * self.width, self.width, self.dropout)
        self.blocks = nn.ModuleList(Block(self.width, "linear") for _ in range(self.depth))

    def decode(
        self, inputs: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the blocks' outputs; there is no auxiliary loss."""
        tokens, outputs = self.bottleneck(inputs, generator), []
        for block in self.blocks:
            tokens = block(tokens)
            outputs.append(tokens)
        return outputs, inputs.new_zeros(())

    def factors(self, distances: torch.Tensor, share: float) -> torch.Tensor | None:
        """Return `hard_factors`, or None where nothing is discounted."""
        return hard_factors(distances, share) if share > 0 else None


class INPFormerStudent(Student):
    """Learned tokens gather an image's own normal prototypes, from which alone the decoder rebuilds it.

    Args:
        prototypes: learned tokens.
        gather: weight of the gather loss: mean over patches of 1 - cos to the nearest prototype.
        options: of `Student`.
    """

    rates = (1e-3, 1e-4)

    def __init__(
        self, channels: int, shares: Sequence[int], *, prototypes: int = 6, gather: float = 0.2, **options: Any
    ) -> None:
        self.count, self.gather = prototypes, gather
        super().__init__(channels, shares, **options)

    def build(self) -> None:
        """Make tokens, aggregation, bottleneck and blocks."""
        plain = self.width == self.channels
        self.inlet = nn.Identity() if plain else nn.Linear(self.channels, self.width)
        self.prototypes = nn.Parameter(torch.zeros(self.count, self.width))
        self.aggregation = Block(self.width, "softmax")
        self.bottleneck = Mlp(self.width, 4 * self.width, self.width)
        self.blocks = nn.ModuleList(Block(self.width, "prototype", residual=False) for _ in range(self.depth))

    def decode(
        self, inputs: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the blocks' outputs and the weighted gather loss."""
        tokens = self.inlet(inputs)
        prototypes = self.aggregation(self.prototypes.expand(len(tokens), -1, -1), tokens)
        auxiliary = self.gather * gather_loss(tokens, prototypes)
        tokens, outputs = self.bottleneck(tokens), []
        for block in self.blocks:
            tokens = block(tokens, prototypes)
            outputs.append(tokens)
        return outputs, auxiliary

    def factors(self, distances: torch.Tensor, share: float) -> torch.Tensor:
        """Return `adaptive_factors`; `share` is not used."""
        return adaptive_factors(distances)


def gather_loss(tokens: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens (n, P, C) of 1 - cos to the nearest of the image's prototypes (n, M, C)."""
    cosine = F.normalize(tokens, dim=2) @ F.normalize(prototypes, dim=2).transpose(1, 2)
    return (1 - cosine).amin(2).mean()
