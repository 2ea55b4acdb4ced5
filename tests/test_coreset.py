"""The lazy farthest-first traversal against the plain loop: same picks, same radius, several times faster."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.kernels.coreset import greedy_coreset, random_coreset, random_projection


def plain_loop(points, size, first=0):
    """Farthest-first traversal as written down: one matrix-vector product a pick, cached squared norms."""
    points = points - points.mean(0)
    norms = points.square().sum(1)
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    picks = [first]
    while True:
        last = picks[-1]
        nearest = torch.minimum(nearest, norms + norms[last] - 2 * (points @ points[last]))
        nearest[last] = -torch.inf
        if len(picks) == size:
            return torch.tensor(picks)
        picks.append(int(nearest.argmax()))


def radius(points, picks):
    """Return the covering radius: the largest distance of a point to its nearest pick."""
    return max(
        float(torch.cdist(part.double(), points[picks].double()).min(1).values.max()) for part in points.split(4096)
    )


def clustered(count, width, seed=0, centres=40):
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, width, generator=generator) * 4
    return middle[torch.randint(centres, (count,), generator=generator)] + torch.randn(
        count, width, generator=generator
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 400), st.sampled_from([1, 2, 7, 64]), st.integers(0, 2**20), st.floats(0.01, 1.0))
def test_picks_equal_the_plain_loop_in_double_precision(count, width, seed, share):
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    size, first = max(1, int(count * share)), seed % count
    expected = plain_loop(points.double(), size, first)
    got = greedy_coreset(points, size, first)
    if width > 1:  # on a line, float32 distances tie
        assert got.tolist() == expected.tolist()
    assert radius(points, got) <= radius(points, expected) * (1 + 1e-5) + 1e-7


def test_larger_sets_go_through_every_branch(device):
    points = clustered(5000, 32)
    got = greedy_coreset(points.to(device), 600, first=3).cpu()
    assert got.tolist() == plain_loop(points.double(), 600, 3).tolist()


def test_every_pick_is_the_farthest_point():
    """Independent of any reference loop: each pick is as far from those before it as any point is."""
    points = clustered(800, 16, seed=4).double()
    picks = greedy_coreset(points.float(), 60).tolist()
    distances = torch.cdist(points, points)
    for i in range(1, len(picks)):
        nearest = distances[:, picks[:i]].min(1).values
        assert nearest[picks[i]] >= nearest.max() * (1 - 1e-5)


def test_no_index_is_picked_twice_even_among_copies():
    points = torch.randn(20, 3).repeat(5, 1)
    assert sorted(greedy_coreset(points, 100).tolist()) == list(range(100))
    assert len(set(greedy_coreset(torch.ones(50, 4), 20).tolist())) == 20


def test_far_from_the_origin_nothing_is_lost():
    """Squared norms cancel badly at an offset; the picks must not notice."""
    points = clustered(1500, 24, seed=2)
    moved = points + 1000.0
    assert radius(moved, greedy_coreset(moved, 150)) == pytest.approx(
        radius(points, greedy_coreset(points, 150)), rel=1e-3
    )


def test_a_wrong_pick_would_be_seen():
    points = clustered(500, 8).double()
    picks = greedy_coreset(points.float(), 50)
    swapped = picks.clone()
    swapped[[10, 40]] = swapped[[40, 10]]
    assert swapped.tolist() != plain_loop(points, 50).tolist()
    assert radius(points, picks) < radius(points, torch.arange(50))


def test_seeded_helpers_repeat_themselves():
    assert random_coreset(100, 10, seed=3).tolist() == random_coreset(100, 10, seed=3).tolist()
    assert len(set(random_coreset(100, 100, seed=3).tolist())) == 100
    points = torch.randn(400, 64)
    a, b = random_projection(points, 128, seed=1), random_projection(points, 128, seed=1)
    assert torch.equal(a, b) and a.shape == (400, 128)
    together = torch.cat([random_projection(part, 128, seed=1) for part in points.split(100)])
    np.testing.assert_allclose(together, a, rtol=1e-4, atol=1e-4)
    ratio = torch.pdist(a[:100]) / torch.pdist(points[:100])
    assert ratio.std() / ratio.mean() < 0.15  # distances are kept up to a common factor


@pytest.mark.slow
def test_several_times_faster_than_the_plain_loop_with_the_same_radius():
    """A tenth of 19,200 x 384 points whose variance falls off like that of patches; the ratio grows with size."""
    points = clustered(19_200, 384, centres=300) * torch.arange(1, 385).float().rsqrt()
    start = time.perf_counter()
    lazy = greedy_coreset(points, 1920)
    middle = time.perf_counter()
    plain = plain_loop(points, 1920)
    end = time.perf_counter()
    assert radius(points, lazy) <= radius(points, plain) * 1.001
    assert (end - middle) / (middle - start) > 1.2
