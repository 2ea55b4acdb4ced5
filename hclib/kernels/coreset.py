"""Greedy k-center coresets: exact farthest-first traversal, evaluated lazily.

The plain loop compares every point with every new centre, P * size distances one matrix-vector product at a
time. Here a point's distance to the coreset may be *stale*: it then ignores the newest centres and is an
upper bound. Only points at the top of the stale order can be the farthest, so a round

1. refreshes the highest points, one matrix product against the centres that each has not seen,
2. takes those that still exceed every bound left alone, evaluates their distances directly in double
precision, and
   runs the traversal among them for as long as the farthest exceeds all other bounds,
3. shows the new centres to the points around them (the nearest of several hundred small groups), which lowers
most of
   the stale bounds before they would have to be refreshed.

The picks are those of the plain loop in double precision: matrix products only rule points out, by more than
their rounding.

Source: Sener and Savarese, Active Learning for CNNs: A Core-Set Approach, ICLR 2018, algorithm 1 (greedy
    k-center);
Roth et al., CVPR 2022, algorithm 1. The lazy evaluation is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from hclib.kernels.distances import CHUNK, centre_of, full_precision, nearest, row_minimum

REFRESH = 512  # points refreshed in a round, at least
WORK = 1 << 18  # distances evaluated in a round, about: early rounds refresh more points
CONTENDERS = 512  # points among which one round chooses, at most
GROUP = 512  # points in a group, about
WAIT = 32  # new centres that a group collects before it looks at them
NEIGHBORHOOD = 4  # groups that a new centre is shown to
ROUNDING = 2.0**-17  # of a squared distance from a float32 product, relative to the largest squared norm
DOUBLE_BELOW = 1024  # float32 products are too coarse where the squared radius is less than this many roundings
NARROW = 16  # channels up to which products are always in double precision


def greedy_coreset(points: torch.Tensor, size: int, first: int = 0, *, progress: bool = False) -> torch.Tensor:
    """Choose points by exact farthest-first traversal in L2, starting with `first`.

    Every next pick is the point farthest from all picks before it. Distances are compared in double precision
    on the float32 points; points at exactly the same distance are taken in the order of their index (among
    several thousand such points, in some fixed order). No index is picked twice: when only copies of chosen
    points are left, they follow in the order of their index.

    Args:
        points: (P, C) floating point, on any device; compared in float32. Beside it, another copy is held.
        size: points to choose, 1 <= size <= P.
        first: index of the first pick.
        progress: show a progress bar.

    Returns:
        (size,) int64 indices into `points`, in the order in which they were picked, on the device of
        `points`.

    Raises:
        ValueError: `points` is not (P, C) floating point or not finite, or `size` or `first` is out of range.
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or 0 in points.shape or not points.is_floating_point():
        raise ValueError(f"points: shape {tuple(points.shape)}, {points.dtype}; expected (P, C) floating point")
    if not 1 <= size <= len(points):
        raise ValueError(f"size {size}: must lie between 1 and the {len(points)} points")
    if not 0 <= first < len(points):
        raise ValueError(f"first {first}: must be the index of one of the {len(points)} points")
    bar = tqdm(total=size, desc="coreset", unit="point", disable=not progress)
    with torch.no_grad(), full_precision(points.device), bar:
        state = _start(points.detach().float(), size, first)
        width = 1
        while state.count < size:
            bar.update(state.count - bar.n)
            highest = float(state.bound.amax())
            if highest <= (DOUBLE_BELOW + 2) * state.slack and state.slack > 0:
                _go_double(state)
            elif highest == 0:
                _append_copies(state, size)
                break
            contenders, limit, idle = _contenders(state, width)
            picked = _traverse(state, contenders, limit, size, force=idle and width >= 16)
            width = min(16, 2 * width) if idle and not picked else max(1, width // 2)
        bar.update(size - bar.n)
        return state.order[state.chosen[:size]]


@dataclass
class _State:
    """A traversal under way; its rows are the points, centred and sorted by group."""

    points: torch.Tensor  # (P, C) as given
    order: torch.Tensor  # (P,) int64, row -> index into points
    rows: torch.Tensor  # (P, C) centred
    norms: torch.Tensor  # (P,) squared
    mean: torch.Tensor  # (C,) float64
    groups: torch.Tensor  # (G, C) centroids
    edges: list[int]  # (G + 1,) first row of each group
    waiting: list[list[int]]  # (G,) centres that a group has not looked at
    bound: torch.Tensor  # (P,) squared distance to the centres seen; -1 for a chosen row
    owner: torch.Tensor  # (P,) int64, row of the centre that gives `bound`
    seen: torch.Tensor  # (P,) int64, centres that `bound` certainly covers
    chosen: torch.Tensor  # (size,) int64 rows
    centres: torch.Tensor  # (size, C) their coordinates, padded to whole chunks
    centre_norms: torch.Tensor
    count: int
    rounding: float  # of a squared distance from a float32 product, at most
    slack: float  # `rounding`, or 0 once products are in double precision


def _start(points: torch.Tensor, size: int, first: int) -> _State:
    mean = centre_of(points)
    groups, label = _group(points, mean, len(points) // GROUP if size > 4 * WAIT else 1)
    order = label.argsort(stable=True)
    rows = points[order].sub_(mean)
    norms = torch.linalg.vecdot(rows, rows)
    if not torch.isfinite(norms).all():
        bad = int(order[~torch.isfinite(norms)].min())
        raise ValueError(f"points: row {bad} holds NaN, infinity or values too large to square")
    padded = -(-size // CHUNK) * CHUNK
    state = _State(
        points=points,
        order=order,
        rows=rows,
        norms=norms,
        mean=mean.double(),
        groups=groups,
        edges=[0, *torch.bincount(label, minlength=len(groups)).cumsum(0).tolist()],
        waiting=[[] for _ in groups],
        bound=rows.new_full((len(rows),), torch.inf),
        owner=torch.zeros_like(order),
        seen=torch.zeros_like(order),
        chosen=order.new_zeros(padded),
        centres=rows.new_zeros(padded, rows.shape[1]),
        centre_norms=rows.new_full((padded,), torch.inf),
        count=0,
        rounding=ROUNDING * float(norms.amax()),
        slack=ROUNDING * float(norms.amax()),
    )
    if rows.shape[1] <= NARROW or state.slack == 0:
        _go_double(state)
    _add_centres(state, (order == first).nonzero()[0])
    return state


def _group(points: torch.Tensor, mean: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centroids (G, C) and every point's nearest (P,): a few Lloyd steps on a fixed sample."""
    if count < 2:
        return points.new_zeros(1, points.shape[1]), torch.zeros(len(points), dtype=torch.int64, device=points.device)
    sample = points[torch.linspace(0, len(points) - 1, min(len(points), 8 * count)).long()] - mean
    centroids = sample[:: len(sample) // count][:count].clone()
    for _ in range(4):
        label = _nearest_row(sample, centroids)
        total = torch.zeros_like(centroids).index_add_(0, label, sample)
        filled = torch.bincount(label, minlength=len(centroids))[:, None]
        centroids = torch.where(filled > 0, total / filled.clamp(min=1), centroids)
    return centroids, torch.cat([_nearest_row(part - mean, centroids) for part in points.split(8192)])


def _nearest_row(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return torch.addmm(torch.linalg.vecdot(centroids, centroids), vectors, centroids.T, alpha=-2).argmin(1)


def _go_double(state: _State) -> None:
    """Go on with products in double precision: bounds stay bounds, but nothing counts as seen."""
    state.bound[state.bound >= 0] += state.slack
    state.seen.zero_()
    state.slack = 0.0
    state.centres, state.centre_norms = state.centres.double(), state.centre_norms.double()
    _set_centres(state, slice(0, state.count))


def _coordinates(state: _State, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows (b, C) about the mean and their squared norms, in the precision of products."""
    if state.slack > 0:
        return _take(state.rows, rows), state.norms[rows]
    values = state.points[state.order[rows]].double() - state.mean
    return values, torch.linalg.vecdot(values, values)


def _take(matrix: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    return matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)


def _set_centres(state: _State, places: slice) -> None:
    state.centres[places], state.centre_norms[places] = _coordinates(state, state.chosen[places])


def _squared(state: _State, rows: torch.Tensor | slice, centres: torch.Tensor | slice) -> torch.Tensor:
    """Return squared distances (b, m) of rows to centres; padding is infinitely far away."""
    values, norms = _coordinates(state, rows)
    squared = torch.addmm(state.centre_norms[centres], values, state.centres[centres].T, alpha=-2)
    return squared.add_(norms[:, None]).to(state.bound.dtype)


def _contenders(state: _State, width: int) -> tuple[torch.Tensor, float, bool]:
    """Refresh the highest rows; return the contenders, the bound on all others, and if nothing was stale."""
    total = len(state.rows)
    number = min(total, width * max(REFRESH, WORK // state.count))
    limit = -1.0
    top = torch.arange(total, device=state.bound.device)
    if number < total:
        values, top = state.bound.topk(number + 1)
        limit, top = float(values[-1]), top[:-1]
    idle = not _refresh(state, top)
    bound = state.bound[top]
    most = width * CONTENDERS
    if len(top) > most:
        values, best = bound.topk(most + 1)
        limit = max(limit, float(values[-1]))
        top, bound = top[best[:-1]], values[:-1]
    return top[bound > max(limit, 0.0)], limit, idle


def _refresh(state: _State, top: torch.Tensor) -> bool:
    """Show the rows `top` all centres that they have not seen; return whether there were any."""
    seen, by_seen = state.seen[top].sort()
    stale = seen < state.count
    top, seen = top[by_seen][stale], seen[stale]
    upper = -(-state.count // CHUNK) * CHUNK
    place = 0
    while place < len(top):
        lower = int(seen[place]) // CHUNK * CHUNK
        part = top[place : place + max(128, (1 << 18) // (upper - lower))]
        place += len(part)
        least, column = row_minimum(_squared(state, part, slice(lower, upper)))
        _lower(state, part, least, state.chosen[lower:upper][column])
    state.seen[top] = state.count
    return len(top) > 0


def _lower(state: _State, rows: torch.Tensor, squared: torch.Tensor, owner: torch.Tensor) -> None:
    """Lower the bounds of `rows` where `squared` is smaller, and note whose distance it is."""
    old = state.bound[rows]
    state.owner[rows] = torch.where(squared < old, owner, state.owner[rows])
    state.bound[rows] = torch.minimum(squared.clamp_(min=0), old)


def _traverse(state: _State, rows: torch.Tensor, limit: float, size: int, *, force: bool) -> int:
    """Run the traversal among `rows` while the farthest exceeds `limit`; return how many were picked."""
    if len(rows) == 0:
        return 0
    rows = rows[state.order[rows].argsort()]  # ties go to the lowest index
    exact = state.points[state.order[rows]].double()
    least = (exact - state.points[state.order[state.owner[rows]]].double()).square_().sum(1)
    centred, norms = state.rows[rows], state.norms[rows]
    above = torch.addmm(norms, centred, centred.T, alpha=-2).add_(norms[:, None]).add_(state.rounding)
    picks, least, owner = _pick_among(
        exact.cpu().numpy(),
        least.cpu().numpy(),
        above.cpu().numpy(),
        2 * state.rounding,
        max(limit * (1 + 1e-6) + state.slack, DOUBLE_BELOW * state.slack),
        size - state.count,
        force,
    )
    bound, moved = torch.from_numpy(least).to(state.bound), torch.from_numpy(owner).to(rows)
    state.owner[rows] = torch.where(moved >= 0, rows[moved], state.owner[rows])
    state.bound[rows] = torch.where(bound > 0, bound.clamp(min=torch.finfo(torch.float32).tiny), bound)
    if picks:
        _add_centres(state, rows[torch.tensor(picks, device=rows.device)])
    return len(picks)


def _pick_among(
    exact: np.ndarray,
    least: np.ndarray,
    above: np.ndarray,
    margin: float,
    limit: float,
    most: int,
    force: bool,
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Pick the farthest of n points again and again while it exceeds `limit`.

    Args:
        exact: (n, C) float64 coordinates.
        least: (n,) float64 squared distances to the coreset, changed in place.
        above: (n, n) float32, no less than the squared distances between the points, by at most `margin`.
        margin: see `above`.
        limit: squared distance, not picked at or below.
        most: picks, at most.
        force: take the first pick even at or below the limit.

    Returns:
        Picks, `least` afterwards (exact above the limit, an upper bound below, -1 for picks), and for each
        point the last pick that lowered it, or -1.
    """
    picks: list[int] = []
    owner = np.full(len(least), -1)
    while len(picks) < most:
        pick = int(least.argmax())
        if least[pick] <= limit and (picks or not force or least[pick] <= 0):
            break
        picks.append(pick)
        closer = np.flatnonzero(above[pick] - margin < least)
        squared = above[pick, closer].astype(np.float64)
        alive = least[closer] > limit
        difference = exact[closer[alive]] - exact[pick]
        squared[alive] = np.einsum("ij,ij->i", difference, difference)
        closer, squared = closer[squared < least[closer]], squared[squared < least[closer]]
        least[closer], owner[closer] = squared, pick
        least[pick] = -1.0
    return picks, least, owner


def _add_centres(state: _State, rows: torch.Tensor) -> None:
    """Record new centres and show them to the groups around them."""
    places = slice(state.count, state.count + len(rows))
    state.chosen[places], state.bound[rows], state.seen[rows] = rows, -1.0, places.stop
    state.count = places.stop
    _set_centres(state, places)
    if len(state.groups) == 1:
        return
    distance = torch.addmm(torch.linalg.vecdot(state.groups, state.groups), state.rows[rows], state.groups.T, alpha=-2)
    near = distance.topk(min(NEIGHBORHOOD, len(state.groups)), dim=1, largest=False).indices.tolist()
    for centre, groups in zip(range(places.start, places.stop), near, strict=True):
        for group in groups:
            state.waiting[group].append(centre)
            if len(state.waiting[group]) == WAIT:
                _show(state, group)


def _show(state: _State, group: int) -> None:
    """Let a group look at the centres that wait for it."""
    centres = torch.tensor(state.waiting[group], device=state.chosen.device)
    state.waiting[group] = []
    members = slice(state.edges[group], state.edges[group + 1])
    least, column = _squared(state, members, centres).min(1)
    rows = torch.arange(members.start, members.stop, device=least.device)
    _lower(state, rows, least, state.chosen[centres][column])


def _append_copies(state: _State, size: int) -> None:
    """Take the rest, all copies of centres, in the order of their index."""
    left = (state.bound >= 0).nonzero()[:, 0]
    left = left[state.order[left].argsort()][: size - state.count]
    state.chosen[state.count : size] = left
    state.count = size


def random_coreset(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Choose `size` of `count` indices uniformly without replacement.

    Returns:
        (size,) int64, in the order drawn; the same for the same `seed`.

    Raises:
        ValueError: `size` is not in 1..count.
    """
    if not 1 <= size <= count:
        raise ValueError(f"size {size}: must lie between 1 and count = {count}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size]


def random_projection(points: torch.Tensor, dim: int = 128, seed: int = 0) -> torch.Tensor:
    """Project points to `dim` dimensions by a random Gaussian matrix, which keeps distances on average.

    Entries are N(0, 1 / dim). The reference program of PatchCore uses an untrained linear layer instead
    (uniform in +-1 / sqrt(C), sampler.py:52-60): another scale, the same coreset on average.

    Args:
        points: (n, C) floating point.
        dim: width of the result.
        seed: the same seed and C give the same matrix, on every device.

    Returns:
        (n, dim) float32 on the device of `points`.

    Raises:
        ValueError: `points` is not (n, C), or `dim` is not positive.
    """
    if points.ndim != 2 or dim < 1:
        raise ValueError(f"points: shape {tuple(points.shape)}, dim {dim}; expected (n, C) and dim >= 1")
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(points.shape[1], dim, generator=generator).mul_(dim**-0.5).to(points.device)
    with torch.no_grad(), full_precision(points.device):
        return points.float() @ matrix


def covering_radius(points: torch.Tensor, chosen: torch.Tensor) -> float:
    """Measure the largest L2 distance of a point to the nearest chosen one.

    Args:
        points: (P, C) floating point.
        chosen: (M,) int64 indices into `points`.

    Returns:
        The radius, in L2.
    """
    return float(nearest(points, points[chosen])[0].max())
