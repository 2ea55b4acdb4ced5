"""`hclib bench`: every fast path beside the plain way, on this machine, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
import torch

from hclib.kernels.coreset import greedy_coreset
from hclib.kernels.distances import nearest, patch_to_image, resolve_device
from hclib.methods.musc import mutual_scores


def bench(points: int, channels: int, ratio: float, device: str = "auto", seed: int = 0) -> pd.DataFrame:
    """Time the kernels against the plain way on clustered random points, and compare the results.

    Args:
        points: patches P, at least 2,000.
        channels: width C.
        ratio: coreset ratio in (0, 1).
        device: "auto", "cpu" or "cuda".
        seed: of the points.

    Returns:
        One row per kernel: `kernel, size, seconds, plain seconds, times faster, difference`, the latter the largest
        between the two results (for the coreset: picks that differ among those that the plain loop made). The plain
        coreset loop makes a tenth of the picks and is scaled up; its time is proportional to them.

    Raises:
        ValueError: too few points or a ratio out of range.
    """
    if points < 2000 or not 0 < ratio < 1:
        raise ValueError(f"points={points}, ratio={ratio}: at least 2000 points and a ratio between 0 and 1")
    place = resolve_device(device)
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(40, channels, generator=generator)
    values = centres[torch.randint(40, (points,), generator=generator)] + torch.randn(
        points, channels, generator=generator
    )
    values = values.to(place)
    size = max(20, int(points * ratio))
    images = values[: points // 250 * 250].view(-1, 250, channels)[:40]  # (n, 250, C)
    first, second = images[: len(images) // 2], images[len(images) // 2 :]
    unit = torch.nn.functional.normalize(images, dim=2)
    rows = [
        _row("greedy_coreset", f"{points} x {channels} -> {size}", *_coreset(values, size)),
        _row(
            "nearest, k = 1",
            f"{points // 2} queries, {size} entries",
            *_pair(
                lambda: nearest(values[: points // 2], values[-size:])[0][:, 0],
                lambda: torch.cat(
                    [torch.cdist(part, values[-size:]).amin(1) for part in values[: points // 2].split(1024)]
                ),
            ),
        ),
        _row(
            "patch_to_image",
            f"{len(first)} images of 250 patches to {len(second)}",
            *_pair(lambda: patch_to_image(first, second), lambda: _each_to_each(first, second)),
        ),
        _row(
            "mutual_scores",
            f"{len(unit)} images of 250 patches",
            *_pair(lambda: mutual_scores(unit), lambda: _mutual(_each_to_each(unit, unit))),
        ),
    ]
    return pd.DataFrame(rows)


def _seconds(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _pair(fast: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor]) -> tuple[float, float, float]:
    """Run both, alternating twice so that neither pays the start alone; return the lesser times and the difference."""
    times = [(_seconds(fast), _seconds(plain)) for _ in range(2)]
    (_, ours), (_, theirs) = times[-1]
    return min(t[0][0] for t in times), min(t[1][0] for t in times), float((ours - theirs).abs().max())


def _coreset(points: torch.Tensor, size: int) -> tuple[float, float, float]:
    part = max(2, size // 10)
    fast, picks = _seconds(lambda: greedy_coreset(points, size))
    plain, expected = _seconds(lambda: plain_coreset(points, part))
    return fast, plain * size / part, float((picks[:part] != expected).sum())


def plain_coreset(points: torch.Tensor, size: int) -> torch.Tensor:
    """Choose by farthest-first traversal as it is usually written: each pick is compared with every point.

    One matrix-vector product a pick, with cached squared norms: already a fast form of the loop.

    Args:
        points: (P, C) floating point.
        size: picks, the first of them point 0.

    Returns:
        (size,) int64.
    """
    points = points - points.mean(0)
    norms = points.square().sum(1)
    bound, picks = torch.full_like(norms, torch.inf), [0]
    for _ in range(size - 1):
        last = picks[-1]
        bound = torch.minimum(bound, norms + norms[last] - 2 * (points @ points[last]))
        bound[last] = -torch.inf
        picks.append(int(bound.argmax()))
    return torch.tensor(picks, device=points.device)


def _each_to_each(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the distance of every patch to its nearest in every other image, (N, P, M)."""
    least = [torch.cdist(images.flatten(0, 1), other).amin(1) for other in others]
    return torch.stack(least, 1).view(*images.shape[:2], -1)


def _mutual(distances: torch.Tensor) -> torch.Tensor:
    """Return the mean over the nearest 30 % of the other images, (N, P)."""
    distances = distances.clone()
    distances.diagonal(dim1=0, dim2=2).fill_(torch.inf)
    return distances.topk(int((len(distances) - 1) * 0.3), dim=2, largest=False).values.mean(2)


def _row(kernel: str, size: str, fast: float, plain: float, difference: float) -> dict:
    times = {"seconds": round(fast, 3), "plain seconds": round(plain, 3), "times faster": round(plain / fast, 1)}
    return {"kernel": kernel, "size": size, **times, "difference": float(f"{difference:.1e}")}
