"""FUN-AD's network, its losses, and the distances that its pseudo-labels come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

HELD = 1 << 24  # distances of one product: 64 MB


@torch.no_grad()
def nearest_squared(
    queries: torch.Tensor, bank: torch.Tensor, *, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest vector of a bank for every query, other than the query itself.

    Squared L2 from a float32 product about the bank's mean: training needs ranks and ratios within a batch, not the
    last digits.

    Args:
        queries: (n, C) float32.
        bank: (M, C) on the same device.
        own: (n,) int64, the bank index of a query that is in the bank, or -1; left out unless the bank holds nothing
            else.

    Returns:
        Squared distances (n,) and indices (n,) int64.
    """
    centre = bank.mean(0)
    bank = bank - centre
    norms = torch.linalg.vecdot(bank, bank)
    step = max(1, HELD // len(bank))
    values, indices = [], []
    for start in range(0, len(queries), step):
        part = queries[start : start + step] - centre
        squared = torch.addmm(norms, part, bank.T, alpha=-2).add_(torch.linalg.vecdot(part, part)[:, None])
        if own is not None and len(bank) > 1:
            mine = own[start : start + step]
            rows = (mine >= 0).nonzero()[:, 0]
            squared[rows, mine[rows]] = torch.inf
        least, found = squared.min(1)
        values.append(least.clamp_(min=0))
        indices.append(found)
    return torch.cat(values), torch.cat(indices)


@torch.no_grad()
def mutual_pairs(features: torch.Tensor) -> torch.Tensor:
    """Find the mutual nearest neighbour of every vector among the others, in L2.

    Args:
        features: (n, C) floating point.

    Returns:
        (n,) int64: j where i and j are each other's nearest, else -1.
    """
    if len(features) < 2:
        return torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
    rows = torch.arange(len(features), device=features.device)
    found = nearest_squared(features, features, own=rows)[1]
    return found.where(found[found] == rows, torch.full_like(found, -1))


def mutual_smoothness(features: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Compute the mutual smoothness loss: half the mean difference of scores over mutual nearest pairs.

    `L_s = mean over pairs (i, j) of |s_i - s_j| / 2`; pairs as in `mutual_pairs`. The program takes the absolute
    difference to the pair's mean score, which is the same (:595-612).

    Args:
        features: (n, C), no gradient flows into them.
        scores: (n,) in [0, 1].

    Returns:
        Scalar; 0 where there is no pair.
    """
    partner = mutual_pairs(features.detach())
    paired = partner >= 0
    if not paired.any():
        return scores.sum() * 0
    return 0.5 * (scores[paired] - scores[partner[paired]]).abs().mean()


def balanced_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum the mean cross entropies of the anomalous and of the normal patches (:574-580); an empty side counts 0.

    Args:
        scores: (n,) in (0, 1).
        labels: (n,) bool, True for anomalous.
    """
    each = F.binary_cross_entropy(scores, labels.to(scores.dtype), reduction="none")
    return sum(each[side].mean() for side in (labels, ~labels) if side.any())


def rescale(values: torch.Tensor) -> torch.Tensor:
    """Bring values to [0, 1] by their extremes; all 0 where they are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


class Network(nn.Module):
    """The adaptor (C to C, leaky ReLU) and the Local-Net FC[C, *hidden, 1] with a sigmoid (program, model.py:365-391).

    Args:
        channels: C.
        hidden: widths between.
        seed: of the weights, uniform in +-1 / sqrt(inputs) as torch's linear layers.
    """

    def __init__(self, channels: int, hidden: Sequence[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [channels, *hidden, 1]
        self.adaptor = _linear(channels, channels, generator)
        self.layers = nn.ModuleList([_linear(*pair, generator) for pair in zip(widths, widths[1:], strict=False)])

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return adapted features (n, C) and scores (n,) of features (n, C)."""
        adapted = self.adapt(features)
        return adapted, self.judge(adapted)

    def adapt(self, features: torch.Tensor) -> torch.Tensor:
        """Return adapted features (n, C)."""
        return F.leaky_relu(self.adaptor(features), 0.2)

    def judge(self, adapted: torch.Tensor) -> torch.Tensor:
        """Return the scores (n,) in (0, 1) of adapted features (n, C)."""
        for layer in self.layers[:-1]:
            adapted = F.leaky_relu(layer(adapted), 0.2)
        return self.layers[-1](adapted)[:, 0].sigmoid()

    def copy(self) -> dict[str, torch.Tensor]:
        """Return the weights as they are now."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        for values in (layer.weight, layer.bias):
            values.copy_((torch.rand(values.shape, generator=generator) * 2 - 1) * inputs**-0.5)
    return layer
