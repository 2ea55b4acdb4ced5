"""Lazy farthest-first traversal against the plain loop in double precision, on kind and on nasty data."""

import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hclib.kernels import coreset
from hclib.kernels.coreset import covering_radius, greedy_coreset, random_coreset, random_projection


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_loop(points, size, first=0):
    """The definition: the next pick is the point farthest from all picks, the lowest index on a tie."""
    points = points.double()
    squared = (points - points[first]).square().sum(1)
    picks = [first]
    while len(picks) < size:
        squared[picks] = -1
        picks.append(int(squared.argmax()))
        squared = torch.minimum(squared, (points - points[picks[-1]]).square().sum(1))
    return torch.tensor(picks)


def cached_norms_loop(points, size, first=0):
    """The plain loop as fast as it gets: float32, one matrix-vector product a pick, norms computed once."""
    norms = points.square().sum(1)
    squared = torch.full((len(points),), torch.inf)
    picks = torch.empty(size, dtype=torch.int64)
    pick = first
    for count in range(size):
        picks[count] = pick
        row = torch.addmv(norms, points, points[pick], alpha=-2).add_(norms[pick])
        torch.minimum(squared, row, out=squared)
        squared[pick] = -1
        pick = int(squared.argmax())
    return picks


def clustered(count, channels, seed=0, groups=60, inner=12):
    """Points on `groups` random `inner`-dimensional planes with a little noise, like several products."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(groups, (count,), generator=rng)
    plane = torch.randn(groups, inner, channels, generator=rng) / inner**0.5
    inside = torch.randn(count, 1, inner, generator=rng)
    points = torch.randn(groups, channels, generator=rng)[label] + 0.1 * torch.randn(count, channels, generator=rng)
    for k in range(groups):
        points[label == k] += (inside[label == k] @ plane[k])[:, 0]
    return points


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 500),
    st.sampled_from([1, 2, 3, 17, 64, 200]),
    st.floats(0.001, 1),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 10.0, 1000.0]),
)
@example(600, 17, 1.0, 0, 0.0)
def test_picks_are_those_of_the_plain_loop(count, channels, share, seed, offset):
    points = draw(count, channels, seed=seed) + offset
    size, first = max(1, int(share * count)), seed % count
    assert torch.equal(greedy_coreset(points, size, first), plain_loop(points, size, first))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 500), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10**6), st.integers(1, 4))
def test_ties_and_copies_follow_the_index(count, channels, share, seed, levels):
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.integers(0, levels, size=(count, channels)).astype(np.float32))
    size = 1 + int(share * (count - 1))
    picks = greedy_coreset(points, size, seed % count)
    assert torch.equal(picks, plain_loop(points, size, seed % count))
    assert len(picks.unique()) == size


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 400), st.integers(1, 200), st.floats(0.01, 1), st.integers(0, 10**6))
def test_tight_clusters_far_apart_are_exact(count, channels, share, seed):
    rng = np.random.default_rng(seed)
    points = 0.01 * rng.normal(size=(count, channels)) + 1000.0 * rng.integers(0, 4, size=(count, 1))
    points = torch.from_numpy(points.astype(np.float32))
    size = max(1, int(share * count))
    assert torch.equal(greedy_coreset(points, size), plain_loop(points, size))


@pytest.mark.parametrize("channels", [8, 48])
def test_many_points_with_groups_and_several_rounds(channels, monkeypatch):
    monkeypatch.setattr(coreset, "GROUP", 40)
    monkeypatch.setattr(coreset, "CONTENDERS", 64)
    points = clustered(2000, channels, seed=3)
    assert torch.equal(greedy_coreset(points, 400, 5), plain_loop(points, 400, 5))


def test_more_ties_than_contenders():
    grid = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij"), 3).reshape(-1, 3)  # 1728 points
    picks = greedy_coreset(grid, 300)
    assert torch.equal(picks, plain_loop(grid, 300))
    narrow = greedy_coreset(torch.cat([grid, torch.zeros(len(grid), 20)], 1), 300)
    assert torch.equal(picks, narrow)


@pytest.mark.parametrize("channels", [4, 40])
def test_constant_points_and_full_size(channels):
    points = torch.full((90, channels), 3.7)
    assert greedy_coreset(points, 90, 7).tolist() == [7, *range(7), *range(8, 90)]
    points = draw(90, channels)
    assert sorted(greedy_coreset(points, 90).tolist()) == list(range(90))
    assert greedy_coreset(points, 1, 4).tolist() == [4]


def test_every_device_and_precision(device):
    points = draw(900, 32)
    expected = plain_loop(points, 200)
    assert torch.equal(greedy_coreset(points.to(device), 200).cpu(), expected)
    half = points.half()
    assert torch.equal(greedy_coreset(half.to(device), 200).cpu(), plain_loop(half.float(), 200))


def test_the_callers_points_are_not_touched():
    points = draw(300, 20)
    before = points.clone()
    greedy_coreset(points, 30)
    assert torch.equal(points, before)


def test_a_moved_point_changes_the_picks():
    points = draw(300, 20)
    picks = greedy_coreset(points, 30)
    points[picks[7]] = points[picks[0]]
    assert not torch.equal(greedy_coreset(points, 30), picks)


def test_progress_ends_at_the_size(capsys):
    greedy_coreset(draw(300, 20), 30, progress=True)
    assert "30/30" in capsys.readouterr().err


def test_wrong_input_is_refused():
    points = draw(10, 20)
    for size in (0, 11):
        with pytest.raises(ValueError, match="size"):
            greedy_coreset(points, size)
    for first in (-1, 10):
        with pytest.raises(ValueError, match="first"):
            greedy_coreset(points, 5, first)
    for bad in (draw(10), torch.zeros(10, 3, dtype=torch.int64), draw(0, 3)):
        with pytest.raises(ValueError, match="points"):
            greedy_coreset(bad, 1)
    for value in (torch.nan, torch.inf, 1e30):
        points[6, 3] = value
        with pytest.raises(ValueError, match="row 6"):
            greedy_coreset(points, 5)
    with pytest.raises(ValueError, match="size"):
        random_coreset(5, 6)
    with pytest.raises(ValueError, match="dim"):
        random_projection(points, 0)


def test_random_coreset_is_seeded_and_without_repeats():
    picks = random_coreset(1000, 300, seed=4)
    assert len(picks.unique()) == 300 and picks.max() < 1000 and picks.dtype == torch.int64
    assert torch.equal(picks, random_coreset(1000, 300, seed=4))
    assert not torch.equal(picks, random_coreset(1000, 300, seed=5))


def test_random_projection_keeps_distances_on_average():
    points = draw(200, 512)
    projected = random_projection(points, 128, seed=1)
    assert projected.shape == (200, 128) and projected.dtype == torch.float32
    ratio = torch.pdist(projected) / torch.pdist(points)
    assert abs(float(ratio.mean()) - 1) < 0.02 and float(ratio.std()) < 0.1
    assert torch.equal(random_projection(points[:7], 128, seed=1), projected[:7])  # whatever the batch
    assert not torch.equal(random_projection(points, 128, seed=2), projected)


def test_covering_radius_is_brute_force():
    points = draw(400, 9)
    picks = greedy_coreset(points, 40)
    expected = torch.cdist(points.double(), points[picks].double()).amin(1).max()
    assert covering_radius(points, picks) == pytest.approx(float(expected), rel=1e-5)
    assert covering_radius(points, torch.arange(400)) == 0


@pytest.mark.slow
def test_several_times_faster_than_the_plain_loop():
    """Both sides on one thread, where a busy machine disturbs them alike; the bound lies below what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        points = clustered(38_400, 384)
        greedy_coreset(points[:4000], 400)  # both sides warm
        cached_norms_loop(points[:4000], 20)
        start = time.perf_counter()
        picks = greedy_coreset(points, 3840)
        lazy = time.perf_counter() - start
        start = time.perf_counter()
        cached_norms_loop(points, 384)  # its time is proportional to the picks: a tenth is enough
        plain = 10 * (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    print(f"plain {plain:.1f} s, lazy {lazy:.1f} s, ratio {plain / lazy:.1f}")
    assert plain > 4 * lazy, f"{plain:.1f} s against {lazy:.1f} s"
    assert len(picks.unique()) == 3840


@pytest.mark.slow
def test_radius_equals_the_plain_loops():
    points = clustered(12_000, 384, seed=1)
    lazy = covering_radius(points, greedy_coreset(points, 1200))
    assert lazy == pytest.approx(covering_radius(points, cached_norms_loop(points, 1200)), rel=1e-3)
