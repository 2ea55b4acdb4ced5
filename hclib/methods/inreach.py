"""InReaCh: channels of patches that find each other across images; what never recurs stays out of the memory bank.

After McIntosh and Branzan Albu, "Inter-Realization Channels: Unsupervised Anomaly Detection Beyond One-Class
Classification" (ICCV 2023). The paper's text is not at hand: what is done here follows the notes on the authors'
program (commit a0d54ba); files with lines are its.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from hclib.kernels.coreset import greedy_coreset, random_projection
from hclib.kernels.distances import full_precision, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.kernels.memory import MemoryBank
from hclib.methods.patchcore import patch_blocks, score_patches
from hclib.methods.state import load_state, save_state

HELD = 1 << 24  # distances of one product: 64 MB


@torch.no_grad()
def mutual_matches(images: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Match every patch of every image with its mutual nearest neighbour in each seed image.

    Patch p of an image and patch q of a seed match when q is the seed's patch nearest to p and p is the image's patch
    nearest to q.

    Args:
        images: (N, P, C) floating point.
        seeds: (S, R, C) on the same device.

    Returns:
        (N, P, S) int64, the matching patch q of each seed or -1, and (N, P, S) float32, its squared L2 distance or
        infinity.
    """
    count, patches, _ = images.shape
    number, origins, _ = seeds.shape
    centre = seeds.flatten(0, 1).mean(0)
    right = (seeds.flatten(0, 1) - centre).float()
    left = (images - centre).float().flatten(0, 1)
    with full_precision(images.device):
        squared = torch.addmm(torch.linalg.vecdot(right, right), left, right.T, alpha=-2)
    squared = squared.add_(torch.linalg.vecdot(left, left)[:, None]).clamp_(min=0).view(count, patches, number, origins)
    least, nearest = squared.min(3)  # (N, P, S)
    back = squared.argmin(1)  # (N, S, R): the image's patch nearest to each of the seed's
    returned = back.gather(2, nearest.transpose(1, 2)).transpose(1, 2)  # (N, P, S)
    mutual = returned == torch.arange(patches, device=images.device)[:, None]
    return nearest.masked_fill(~mutual, -1), least.masked_fill(~mutual, torch.inf)


class InReaCh:
    """A bank of the patches that belong to channels: groups of mutual nearest neighbours across training images.

    A few training images are seeds; each of their patches starts a channel. A patch of any other image joins the
    channel of its closest mutual nearest neighbour among the seeds, or none. Channels with more than `members`
    patches are kept, without the patches farther from the channel's mean than `spread` of its standard deviations
    (root mean square distance; InReaCh.py:135-180). A defect that does not recur finds no partner and stays out.
    Labels are never used.

    Args:
        seeds: training images whose patches start channels; drawn with `seed`. The program takes the first ones in the
            order of its file system.
        members: a channel has more patches than this, its seed's included.
        spread: see above.
        ratio: share of the channels' patches kept, by a greedy coreset; 1, all of them, is the program's.
        squared: report squared L2 (the program) instead of L2.
        sigma: Gaussian smoothing of the pixel maps in pixels, and of the maps whose maximum is the image score.
        projection: width of the random projection inside the coreset, None for none.
        dim: embedding width for CNN encoders.
        patch_size: neighbourhood of a local patch.
        seed: seeds the seeds and the coreset.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        bank: the memory bank.
        seed_images: (S,) rows of the training features.
        member: (N, h, w) bool, which training patches belong to kept channels (absent after `load`).
        channels: how many channels were kept.
    """

    def __init__(
        self,
        *,
        seeds: int = 10,
        members: int = 3,
        spread: float = 5.0,
        ratio: float = 1.0,
        squared: bool = True,
        sigma: float = 13.0,
        projection: int | None = 128,
        dim: int = 1024,
        patch_size: int = 3,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        if seeds < 1 or not 0 < ratio <= 1:
            raise ValueError(f"seeds={seeds}, ratio={ratio}: at least one seed image, and a share in (0, 1]")
        self.seeds, self.members, self.spread, self.ratio = seeds, members, spread, ratio
        self.squared, self.sigma, self.projection = squared, sigma, projection
        self.patch_options = {"dim": dim, "patch_size": patch_size}
        self.seed, self.device = seed, str(device)
        self.bank: MemoryBank | None = None
        self.seed_images: np.ndarray | None = None
        self.member: np.ndarray | None = None
        self.channels = 0

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Grow the channels and build the bank; `labels` are accepted and ignored.

        Raises:
            ValueError: fewer than two training images, or no channel has enough members.
        """
        if len(train) < 2:
            raise ValueError(f"{len(train)} training images: channels run across images, give 2 or more")
        generator = np.random.default_rng(self.seed)
        number = min(self.seeds, len(train))
        self.seed_images = np.sort(generator.choice(len(train), number, replace=False))
        channel = self._assign(train)  # (N, h, w), -1 for none
        kept = self._filter(train, channel)
        if not kept.any():
            raise ValueError(
                f"no channel has more than {self.members} patches within {len(train)} images: lower `members`, or give "
                "more images of one product"
            )
        self.member, self.channels = kept.numpy(), len(channel[kept].unique())
        points = torch.cat([block[rows] for block, rows in _with(train, kept, self.patch_options)])
        if self.ratio < 1:
            projection_seed, first_seed = (int(s) for s in generator.integers(2**31, size=2))
            flat = points if self.projection is None else random_projection(points, self.projection, projection_seed)
            first = int(np.random.default_rng(first_seed).integers(len(points)))
            size = max(1, int(len(points) * self.ratio))
            points = points[greedy_coreset(flat.to(resolve_device(self.device)), size, first=first).cpu()]
        self.bank = MemoryBank(points, self.device)
        return self

    def _assign(self, train: Features) -> torch.Tensor:
        """Return the channel of every patch, (N, h, w) int64: seed number * P + seed patch, or -1."""
        device = resolve_device(self.device)
        seeds = torch.cat(list(patch_blocks(train.subset(self.seed_images), **self.patch_options))).flatten(1, 2)
        seeds, patches = seeds.to(device), seeds.shape[1]
        result, start = [], 0
        for block in patch_blocks(train, **self.patch_options):
            for images in block.flatten(1, 2).split(max(1, HELD // (patches * seeds.shape[:2].numel()))):
                match, squared = mutual_matches(images.to(device), seeds)
                own = torch.arange(start, start + len(images))[:, None] == torch.as_tensor(self.seed_images)  # (n, S)
                squared.masked_fill_(own[:, None].to(device), torch.inf)
                least, best = squared.min(2)  # (n, P)
                found = best * patches + match.gather(2, best[:, :, None])[:, :, 0]
                result.append(found.masked_fill_(least.isinf(), -1).cpu())
                start += len(images)
        channel = torch.cat(result).view(len(train), *block.shape[1:3])
        return self._start_channels(channel, patches)

    def _start_channels(self, channel: torch.Tensor, patches: int) -> torch.Tensor:
        """Let every seed patch that attracted others, and joined none itself, belong to its own channel."""
        attracted = torch.bincount(channel[channel >= 0], minlength=len(self.seed_images) * patches) > 0
        for number, row in enumerate(self.seed_images.tolist()):
            own = torch.arange(number * patches, (number + 1) * patches).view(channel.shape[1:])
            channel[row] = torch.where((channel[row] < 0) & attracted[own], own, channel[row])
        return channel

    def _filter(self, train: Features, channel: torch.Tensor) -> torch.Tensor:
        """Return which patches (N, h, w) belong to channels that are large enough, outliers of a channel left out."""
        kept = channel >= 0
        size = torch.bincount(channel[kept])
        kept &= size[channel.clamp(min=0)] > self.members
        if not kept.any():
            return kept
        total = variance = None
        for block, rows, names in _with_channels(train, kept, channel, self.patch_options):
            values = block[rows].double()
            if total is None:
                total = values.new_zeros(len(size), values.shape[1])
                variance = values.new_zeros(len(size))
            total.index_add_(0, names, values)
        mean = total / size.clamp(min=1)[:, None]
        distances = []
        for block, rows, names in _with_channels(train, kept, channel, self.patch_options):
            distances.append((block[rows].double() - mean[names]).square().sum(1))
            variance.index_add_(0, names, distances[-1])
        variance /= size.clamp(min=1)
        near = torch.cat(distances) <= self.spread**2 * variance[channel[kept]]
        kept[kept.clone()] = near
        size = torch.bincount(channel[kept], minlength=len(size))
        return kept & (size[channel.clamp(min=0)] > self.members)

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images; `labels` are accepted and ignored.

        Returns:
            Scores with `group` 0; an image's score is the maximum of its smoothed map at the encoder's resolution.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
        """
        if self.bank is None:
            raise RuntimeError("InReaCh has no memory bank yet: call fit(train) or InReaCh.load(folder) first")
        patch = score_patches(self.bank, test, squared=self.squared, **self.patch_options)
        image = image_scores(patch, "map_max", size=int(test.encoder["image_size"]), sigma=self.sigma)
        return Scores(patch, image, np.zeros(len(patch), np.int64), self.sigma)

    def save(self, folder: str | Path) -> None:
        """Write options (JSON) and bank (safetensors); a loaded copy gives the same scores bit for bit."""
        if self.bank is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        tensors = {"bank": self.bank.points, "seed_images": torch.as_tensor(self.seed_images)}
        save_state(folder, "InReaCh", {**self._options(), "channels": self.channels}, tensors)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote."""
        options, tensors = load_state(folder, "InReaCh")
        channels = options.pop("channels")
        detector = cls(**options, device=device)
        detector.bank = MemoryBank(tensors["bank"], resolve_device(device))
        detector.seed_images, detector.channels = tensors["seed_images"].numpy(), channels
        return detector

    def _options(self) -> dict:
        names = ("seeds", "members", "spread", "ratio", "squared", "sigma", "projection", "seed")
        return {name: getattr(self, name) for name in names} | self.patch_options


def _with(train: Features, kept: torch.Tensor, options: dict) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield blocks of patches (n, h, w, C) with their part of `kept`."""
    start = 0
    for block in patch_blocks(train, **options):
        yield block, kept[start : start + len(block)]
        start += len(block)


def _with_channels(
    train: Features, kept: torch.Tensor, channel: torch.Tensor, options: dict
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield blocks of patches with their part of `kept` and the channels of the kept ones."""
    start = 0
    for block, rows in _with(train, kept, options):
        yield block, rows, channel[start : start + len(block)][rows]
        start += len(block)
