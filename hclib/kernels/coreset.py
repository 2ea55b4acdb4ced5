"""Greedy k-center coresets: exact farthest-first traversal, evaluated lazily."""

from __future__ import annotations

import torch


def greedy_coreset(points: torch.Tensor, size: int, first: int = 0, *, progress: bool = False) -> torch.Tensor:
    """Choose `size` points by farthest-first traversal in L2 (first version, refined in the next commits)."""
    points = points.float()
    x = points - points.mean(0)
    nx = (x * x).sum(1)
    chosen = torch.empty(size, dtype=torch.int64, device=points.device)
    centres, norms = x.new_empty(size, x.shape[1]), x.new_empty(size)
    bound = (x - x[first]).square().sum(1)
    bound[first] = -1
    since = torch.ones(len(x), dtype=torch.int64, device=points.device)
    chosen[0], centres[0], norms[0], n = first, x[first], nx[first], 1
    while n < size:
        top = bound.topk(min(513, len(x)))
        limit = float(top.values[-1]) if len(x) > 513 else -1.0
        index = top.indices[:512]
        index = index[since[index].argsort()]
        for part in index.split(128):
            start = int(since[part].min())
            if start < n:
                d = torch.addmm(norms[start:n], x[part], centres[start:n].T, alpha=-2).amin(1) + nx[part]
                bound[part] = torch.minimum(bound[part], d.clamp_(min=0))
        since[index] = n
        index = index[bound[index] > limit]
        if len(index) == 0:
            continue
        pairs = (torch.cdist(x[index], x[index]) ** 2).cpu().numpy()
        left = bound[index].cpu().numpy()
        while n < size and left.max() > limit:
            pick = int(left.argmax())
            chosen[n], centres[n], norms[n] = index[pick], x[index[pick]], nx[index[pick]]
            left = left.clip(max=pairs[pick])
            left[pick] = -1
            n += 1
        bound[index] = torch.from_numpy(left).to(bound)
        since[index] = n
    return chosen


def random_coreset(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Choose `size` of `count` points uniformly without replacement: LongTensor (size,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:size]


def random_projection(points: torch.Tensor, dim: int = 128, seed: int = 0) -> torch.Tensor:
    """Project (n, C) to (n, dim) by a seeded Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(points.shape[1], dim, generator=generator) / dim**0.5
    return points.float() @ matrix.to(points.device)
