"""MuSc: unlabelled images score each other, patch by patch; no training, no labels, no prompts.

After Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of
the Unlabeled Images" (ICLR 2024): LNAMD (`aggregate`), MSM (`mutual_scores`), RsCIN (`rescore`), and with
reference images the few-shot variant and MuSc+. Files with lines are the reference program's (b76b93d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F

from hclib.kernels.clustering import Clusters, clusters_from_labels, semantic_clusters
from hclib.kernels.distances import full_precision, nearest, pair_distances, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores, upsample

AGGREGATED = 16  # images aggregated at a time
ROWS = {"cpu": 1024, "cuda": 8192}  # patches of one block of images; a product holds ROWS x ROWS values
NEAR = 0.01  # minima below this part of the squared norms are evaluated again from differences
HELD = 1 << 30  # bytes of distances that wait for their image's turn


def aggregate(tokens: Any, degree: int, *, device: str | torch.device | None = None) -> torch.Tensor:
    """Aggregate patch tokens over `degree` x `degree` neighbours (LNAMD, section 3.1) and scale them to length 1.

    Each image is first brought to mean 0 and variance 1 over all its values (eps 1e-5); positions outside the grid
    count as zeros. The reference program's unfolding and adaptive pooling are the same mean (_LNAMD.py:84-126).

    Args:
        tokens: (N, h, w, C) floating point, tensor or array; read 16 images at a time.
        degree: odd side r of the neighbourhood; 1 pools nothing.
        device: where to work and return; by default where `tokens` are.

    Returns:
        (N, P, C) float32, P = h * w, L2-normalised.

    Raises:
        ValueError: `degree` is even or below 1, or `tokens` is not (N, h, w, C).
    """
    if degree < 1 or degree % 2 == 0:
        raise ValueError(f"degree {degree}: the neighbourhood of a patch has an odd side")
    if len(tokens.shape) != 4 or 0 in tokens.shape[1:]:
        raise ValueError(f"tokens: shape {tuple(tokens.shape)}; expected (N, h, w, C)")
    images, height, width, channels = tokens.shape
    device = resolve_device(device or getattr(tokens, "device", "cpu"))
    result = torch.empty(images, height * width, channels, device=device)
    for start in range(0, images, AGGREGATED):
        part = tokens[start : start + AGGREGATED]
        part = part if isinstance(part, torch.Tensor) else torch.from_numpy(np.array(part))
        part = part.to(device, torch.float32)
        part = F.layer_norm(part, part.shape[1:]).permute(0, 3, 1, 2)  # (n, C, h, w)
        if degree > 1:
            part = F.avg_pool2d(part, degree, 1, degree // 2)
        result[start : start + AGGREGATED] = F.normalize(part.permute(0, 2, 3, 1).flatten(1, 2), dim=2)
    return result


@torch.no_grad()
def mutual_scores(
    features: torch.Tensor,
    fraction: float = 0.3,
    *,
    lower: float = 0.0,
    strategy: str = "mean",
    references: torch.Tensor | None = None,
    half: bool = False,
    held: int = HELD,
) -> torch.Tensor:
    """Score every patch by its distances to the images that hold the most similar patches (MSM, section 3.2).

    An image's distance is that of its nearest patch (Eq. 1); the nearest int((N - 1) * fraction) of the N - 1 other
    images count (Eq. 2, _MSM.py:15-30). Exact. Each pair of images is multiplied once and read in both directions.
    Extra memory: one product (4 MB on a CPU, 256 MB on CUDA), the distances of one block of images, and second
    directions that wait: N * N * P bytes at most, and about `held`; pairs beyond that are multiplied twice.

    Args:
        features: (N, P, C) floating point; the method's are L2-normalised, others may be given.
        fraction: upper end of the interval of nearest images.
        lower: lower end: the nearest int((N - 1) * lower) images are left out (Table 10).
        strategy: "mean" of the interval, its "min" or its "max". Table 4 (a) to (f): (1.0, "min"), (1.0, "max"),
            (1.0, "mean"), (0.3, "min"), (0.3, "max"), (0.3, "mean").
        references: (R, P, C) images that score the others and get no score (A.6.1): N - 1 becomes N + R - 1.
        half: multiply in float16, with an error of about 1e-3 on unit vectors: faster on CUDA, not on a CPU.
        held: bytes for second directions.

    Returns:
        (N, P) float32, L2, on the device of `features`.

    Raises:
        ValueError: too few images for the interval (fewer than 5 by default; the reference program: NaN); a shape,
            device, interval or strategy that does not fit; a vector that is not finite.
    """
    sets = [features] if references is None else [features, references]
    alike = {(part.shape[1:], part.dtype, part.device) for part in sets}
    if features.ndim != 3 or 0 in features.shape[1:] or not features.is_floating_point() or len(alike) > 1:
        found = " and ".join(f"{tuple(part.shape)} {part.dtype} on {part.device}" for part in sets)
        raise ValueError(f"features (and references): {found}; expected (N, P, C) floating point, alike")
    reduce = {"mean": torch.mean, "min": torch.amin, "max": torch.amax}.get(strategy)
    if reduce is None:
        raise ValueError(f'strategy {strategy!r}: choose "mean", "min" or "max"')
    least, others = _least_images(fraction, lower), sum(map(len, sets)) - 1
    low, high = int(others * lower), int(others * fraction)
    if low >= high:
        empty = f"the interval {lower:g} to {fraction:g} of the {others} others is empty"
        raise ValueError(f"{others + 1} images: {empty}; give at least {least} images")
    scores = torch.empty(features.shape[:2], device=features.device)
    with full_precision(features.device):
        for rows, found in _image_distances(sets, half, held):
            scores[rows] = reduce(found.topk(high, dim=2, largest=False).values[:, :, low:], dim=2)
    return scores


def _least_images(fraction: float, lower: float) -> int:
    """Return how many images it takes for the interval to hold one: 5 for the paper's 30 %."""
    if not 0 <= lower < fraction <= 1:
        raise ValueError(f"interval from {lower} to {fraction}: expected 0 <= lower < fraction <= 1")
    return next(n for n in count(2) if int((n - 1) * fraction) > int((n - 1) * lower))


class _Block:
    """A few images' patches (n, P, C), centred in `buffer`, and the squared norms of that (n, P)."""

    def __init__(self, name: str, source: torch.Tensor, start: int, centre: torch.Tensor, buffer: torch.Tensor) -> None:
        self.start, self.patches = start, source[start : start + len(buffer)].float()
        self.centred = torch.sub(self.patches, centre, out=buffer[: len(self.patches)])
        self.norms = torch.linalg.vector_norm(self.centred, dim=2).square_()
        if not torch.isfinite(self.norms).all():
            image, patch = (~torch.isfinite(self.norms)).nonzero()[0].tolist()
            values = "NaN, infinity or values too large to square"
            raise ValueError(f"{name}: patch {patch} of image {start + image} holds {values}; remove or fix it")


def _image_distances(sets: list[torch.Tensor], half: bool, held: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of the first set and their L2 (n, P, N) to the images of all sets, inf to themselves.

    What is large is allocated once: many blocks of mixed sizes would leave the heap in pieces.
    """
    images, patches, channels = sets[0].shape
    step = min(images, max(1, ROWS.get(sets[0].device.type, 1024) // patches))
    place = {"dtype": torch.float32, "device": sets[0].device}
    product, buffers = torch.empty((step * patches) ** 2, **place), torch.empty(2, step, patches, channels, **place)
    centre = torch.nan_to_num(sum(image.float().mean(0) for image in sets[0]) / images, posinf=0, neginf=0)
    named = zip(("features", "references"), sets, strict=False)
    blocks = [(name, part, start) for name, part in named for start in range(0, len(part), step)]
    scored = -(-images // step)
    waiting: list[dict[int, torch.Tensor]] = [{} for _ in blocks]  # of each block: other block -> (n, P, m)
    for a in range(scored):
        left = _Block(*blocks[a], centre, buffers[0])
        found, waiting[a] = waiting[a], {}
        held += sum(piece.nbytes for piece in found.values())
        for b in sorted(set(range(len(blocks))) - set(found)):
            right = left if a == b else _Block(*blocks[b], centre, buffers[1])
            squared = _squared(left, right, product, half)  # (n, P, m, P)
            if a == b:
                squared.diagonal(dim1=0, dim2=2).fill_(torch.inf)
            found[b] = _settle(squared.amin(3), squared, left, right)
            if a < b < scored and held > 0:
                back = squared.amin(1).permute(1, 2, 0).contiguous()
                waiting[b][a] = _settle(back, squared.permute(2, 3, 0, 1), right, left)
                held -= back.nbytes
        yield slice(left.start, left.start + step), torch.cat([found[b] for b in range(len(blocks))], dim=2)


def _squared(left: _Block, right: _Block, product: torch.Tensor, half: bool) -> torch.Tensor:
    """Write squared distances between all patches into `product`, (n, P, m, P); `half` rounds the vectors."""
    rows, columns = left.centred.flatten(0, 1), right.centred.flatten(0, 1)
    squared = product[: len(rows) * len(columns)].view(len(rows), len(columns))
    if half:  # vectors of length <= 1 cannot overflow
        a, b = (block.norms.amax().sqrt().clamp_min(1e-30) for block in (left, right))
        squared.copy_((rows / a).half() @ (columns / b).half().T).mul_(-2 * a * b).add_(right.norms.flatten())
    else:
        torch.addmm(right.norms.flatten(), rows, columns.T, alpha=-2, out=squared)
    return squared.add_(left.norms.view(-1, 1)).view(*left.norms.shape, *right.norms.shape)


def _settle(least: torch.Tensor, squared: torch.Tensor, left: _Block, right: _Block) -> torch.Tensor:
    """Turn the minima `least` (n, P, m) of `squared` into L2, small ones directly from the four best candidates."""
    near = (least <= NEAR * (left.norms[:, :, None] + right.norms.amax(1))).nonzero()
    least.clamp_(min=0).sqrt_()
    for a, p, b in (part.T for part in near.split(512)):
        best = squared[a, p, b].topk(min(4, squared.shape[3]), dim=1, largest=False).indices  # (near, 4)
        rows = b[:, None] * squared.shape[3] + best
        least[a, p, b] = pair_distances(left.patches[a, p], right.patches.flatten(0, 1), rows).amin(1).sqrt()
    return least


def rescore(
    scores: np.ndarray | torch.Tensor,
    tokens: np.ndarray | torch.Tensor,
    windows: Sequence[float] = (1, 2, 3),
    *,
    normalise: bool = True,
    minmax: bool = True,
) -> np.ndarray | torch.Tensor:
    """Smooth the image scores of any method over the most similar images (RsCIN, section 3.3).

    In a window k an image gets the mean score of its k most similar images, itself included, weighted by similarity;
    windows are averaged (Eqs. 4 and 5, _RsCIN.py:5-32). Window 1 is Eq. 5's own term C: the paper's windows 2, 3 are
    (1, 2, 3) here.

    Args:
        scores: (N,) floating point.
        tokens: (N, D) image tokens; similarity is their dot product.
        windows: sizes k >= 1; beyond N (`math.inf`) they mean all images.
        normalise: scale tokens to length 1 (musc.py:175: for CLIP only); an image then always comes first among its
            own neighbours.
        minmax: stretch scores to 0..1 first, as the reference program does (all equal: 0). False keeps their unit; the
            order is the same, since weights sum to 1.

    Returns:
        (N,), array or tensor and dtype as `scores`.

    Raises:
        ValueError: shapes do not fit, no window or one below 1, or similarities without a positive sum.
    """
    values, vectors = torch.as_tensor(scores), torch.as_tensor(tokens)
    if values.ndim != 1 or vectors.ndim != 2 or len(values) != len(vectors) or not values.is_floating_point():
        raise ValueError(f"scores {tuple(values.shape)}, tokens {tuple(vectors.shape)}: expected (N,), (N, D)")
    if not windows or min(windows) < 1:
        raise ValueError(f"windows {tuple(windows)}: give sizes of at least 1, the image itself")
    before, vectors = values.double(), vectors.to(values.device, torch.float64)
    if minmax and len(before):
        span = before.max() - before.min()
        before = (before - before.min()) / torch.where(span > 0, span, 1)
    vectors = F.normalize(vectors, dim=1) if normalise else vectors
    similarity = vectors @ vectors.T  # (N, N)
    ranking = similarity.clone().fill_diagonal_(torch.inf) if normalise else similarity
    order = ranking.argsort(dim=1, descending=True, stable=True)
    weights, after = similarity.gather(1, order), torch.zeros_like(before)
    for window in windows:
        k = int(min(window, len(before)))
        mass = weights[:, :k].sum(1)
        if not (mass > 0).all():
            raise ValueError(f"tokens: the {k} highest similarities of an image sum to 0 or less; use fewer")
        after += (weights[:, :k] * before[order[:, :k]]).sum(1) / mass / len(windows)
    after = after.to(values.dtype)
    return after.numpy() if isinstance(scores, np.ndarray) else after


class MuSc:
    """Zero-shot detector: test images score each other; `fit` matters for reference images only.

    All layers of `Features.maps` and all degrees go into one mean (Eq. 3); the paper's layers end four equal stages of
    the encoder: `load_encoder(layers=("block3", "block6", "block9", "block12"))`. The scores of a coarser layer are
    resized to the finest grid. With class names, or `groups="finch"`, images are scored and re-scored inside their
    group. RsCIN keeps the distances' unit (no min-max): groups stay comparable. Memory: (N, P, C) float32 for one
    layer, degree and subset, and what `mutual_scores` takes.

    Args:
        degrees: odd neighbourhood sides r of LNAMD.
        fraction, mutual_options: see `mutual_scores`; the latter for example `{"strategy": "min"}`.
        windows: see `rescore`, None for no RsCIN; the reference program takes (1, 8, 9) for VisA.
        subsets: parts s that are scored apart (Table 7); RsCIN sees a whole group.
        stratify: None divides at random; "defect" evenly by defect type, as the reference program does
            (datasets/mvtec.py:73-94), which looks at the test labels.
        references: let the images given to `fit` join the scoring (A.6.1, Table 15).
        groups: None is one pile; "finch" clusters the image tokens, and images of clusters too small to be scored join
            the nearest other. Class names given to `score` go first.
        image_score: "map_max" over the map's pixels (musc.py:240) or "max" over patches (section 3.2).
        seed: draws the subsets.
        device: where distances are computed.
    """

    def __init__(
        self,
        *,
        degrees: Sequence[int] = (1, 3, 5),
        fraction: float = 0.3,
        mutual_options: dict | None = None,
        windows: Sequence[float] | None = (1, 2, 3),
        subsets: int = 1,
        stratify: str | None = None,
        references: bool = False,
        groups: str | None = None,
        image_score: str = "map_max",
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        if stratify not in (None, "defect") or groups not in (None, "finch") or subsets < 1:
            raise ValueError(f"stratify={stratify!r}, groups={groups!r}, subsets={subsets}: see the docstring")
        self.degrees, self.windows, self.image_score = tuple(degrees), windows, image_score
        self.mutual_options = {"fraction": fraction, **(mutual_options or {})}
        self.subsets, self.stratify, self.groups = subsets, stratify, groups
        self.references, self.seed, self.device = references, seed, str(device)
        self.least = _least_images(fraction, self.mutual_options.get("lower", 0.0)) * subsets
        self.train, self.train_labels = None, None

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Keep the reference images if they are wanted; their `labels` join them to the classes of `score`."""
        if self.references:
            self.train, self.train_labels = train, labels
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score N test images by each other, inside their class where `labels` gives N class names.

        Returns:
            Scores that upsample as the reference program does (musc.py:225: align_corners=True, no smoothing);
            `group` numbers the classes or clusters, -1 for one pile.

        Raises:
            ValueError: a group or subset with too few images (fewer than five at the paper's 30 %).
            RuntimeError: references are wanted and `fit` was not called.
        """
        if self.references and self.train is None:
            raise RuntimeError(f"{type(self).__name__} has no reference images yet: call fit(train) first")
        tokens = np.asarray(test.tokens, np.float32)
        group, train_group = self._group(tokens, labels)
        grid = max(tuple(maps.shape[1:3]) for maps in test.maps.values())
        patch = np.empty((len(test), *grid), np.float32)
        for number in np.unique(group):
            references = self.train.subset(train_group == number) if self.references else None
            for rows in self._divide(np.flatnonzero(group == number), test):
                patch[rows] = self._score(test.subset(rows), references, grid)
        image = image_scores(patch, self.image_score, size=test.encoder["image_size"], align_corners=True)
        for number in np.unique(group) if self.windows else ():
            rows = group == number
            image[rows] = rescore(image[rows], tokens[rows], self.windows, minmax=False)
        return Scores(patch, image, group, sigma=0.0, align_corners=True)

    def _group(self, tokens: np.ndarray, labels: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the group of every test image (N,) and of every reference image (R,), where there are any."""
        if labels is None and self.groups is None:
            return np.full(len(tokens), -1), np.full(len(self.train), -1) if self.references else None
        if labels is None:
            clusters, group = _large_clusters(semantic_clusters(tokens, "finch").labels, tokens, self.least)
        else:
            clusters = clusters_from_labels(tokens, labels)
            group = clusters.labels
        if not self.references:
            return group, None
        if labels is not None and self.train_labels is not None:
            return group, np.array([[*clusters.names, str(name)].index(str(name)) for name in self.train_labels])
        return group, clusters.route(self.train.tokens)

    def _divide(self, rows: np.ndarray, test: Features) -> list[np.ndarray]:
        rows = np.random.default_rng([self.seed, rows[0]]).permutation(rows)
        if self.stratify:
            rows = rows[np.argsort(test.index["defect"].to_numpy()[rows], kind="stable")]
        return [np.sort(rows[start :: self.subsets]) for start in range(self.subsets)]

    def _score(self, test: Features, references: Features | None, grid: tuple[int, int]) -> np.ndarray:
        """Return the mean over layers and degrees (Eq. 3) on one grid, (N, h, w) float32."""
        device, total = resolve_device(self.device), 0.0
        for layer, maps in test.maps.items():
            for degree in self.degrees:
                other = aggregate(references.maps[layer], degree, device=device) if references else None
                scores = self._patch_scores(aggregate(maps, degree, device=device), other).view(maps.shape[:3])
                total = total + (scores if scores.shape[1:] == grid else upsample(scores, grid, align_corners=True))
        return (total / (len(test.maps) * len(self.degrees))).cpu().numpy()

    def _patch_scores(self, patches: torch.Tensor, references: torch.Tensor | None) -> torch.Tensor:
        return mutual_scores(patches, references=references, **self.mutual_options)


class MuScPlus(MuSc):
    """MuSc+: `MuSc` with distances to the nearest patch of the reference images alone (A.6.2, Eqs. 9-11, Table 16)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, references=True)
        self.least = 1

    def _patch_scores(self, patches: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        if references is None:
            raise ValueError("a group of test images has no reference images: give `fit` some of each class")
        return nearest(patches.flatten(0, 1), references.flatten(0, 1))[0].view(patches.shape[:2])


def _large_clusters(group: np.ndarray, tokens: np.ndarray, least: int) -> tuple[Clusters, np.ndarray]:
    """Return the groups of at least `least` images (all in one if there are none) and everyone's nearest of them."""
    large = np.isin(group, np.flatnonzero(np.bincount(group) >= least))  # (N,)
    if not large.any():
        large, group = ~large, np.zeros_like(group)
    clusters = clusters_from_labels(tokens[large], group[large])
    joined = clusters.route(tokens)
    joined[large] = clusters.labels
    return clusters, joined
