"""Semantic groups: the silhouette rule, both FINCH lists, routing, degenerate sets, the real CLIP tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, silhouette_score

from hclib.kernels.clustering import Clusters, clusters_from_labels, finch_partitions, semantic_clusters
from hclib.paths import data_roots

METHODS = ["finch", "kmeans", "dbscan", "hdbscan"]
QUICK = {"finch": {}, "kmeans": {"max_clusters": 5}, "dbscan": {}, "hdbscan": {}}


def blobs(groups=5, each=30, dims=16, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(groups, dims)) * 3
    truth = np.repeat(np.arange(groups), each)
    return (centres[truth] + spread * rng.normal(size=(len(truth), dims))).astype(np.float32), truth


def mixture(seed):
    """The data of the golden FINCH lists below."""
    rng = np.random.default_rng(seed)
    groups, dims = rng.integers(1, 12), rng.integers(2, 30)
    centres = rng.normal(size=(groups, dims))
    tokens = (centres[rng.integers(groups, size=rng.integers(3, 250))] * rng.uniform(0, 4)).astype(np.float32)
    return tokens + rng.normal(size=tokens.shape).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_separate_groups_are_found(method):
    tokens, truth = blobs(seed=1)
    found = semantic_clusters(tokens, method, **QUICK[method])
    assert adjusted_rand_score(truth, found.labels) == 1.0
    np.testing.assert_array_equal(found.labels, truth)  # numbered in order of appearance
    np.testing.assert_allclose(found.keys, [tokens[truth == k].mean(0) for k in range(5)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.route(tokens), truth)
    assert found.silhouette == pytest.approx(silhouette_score(tokens, truth), abs=1e-6)
    assert found.labels.dtype == np.int64 and found.keys.dtype == np.float32 and len(found) == 5


@pytest.mark.parametrize(
    ("seed", "distance", "counts"),
    [  # cluster counts that finch-clust 0.2.3 prints for mixture(seed)
        (0, "cosine", [26, 10, 3]),
        (2, "cosine", [15, 4]),
        (2, "euclidean", [17, 5]),
        (3, "cosine", [23, 7]),
        (3, "euclidean", [18, 6, 2]),
        (4, "cosine", [31, 8, 2]),
    ],
)
def test_finch_list(seed, distance, counts):
    levels = finch_partitions(mixture(seed), distance=distance)
    assert [len(np.unique(level)) for level in levels] == counts


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_levels_are_nested_and_the_rule_takes_the_highest_silhouette(seed):
    tokens = mixture(seed)
    found = semantic_clusters(tokens)
    assert list(found.levels) == sorted(found.levels, reverse=True)
    for fine, coarse in zip(found.hierarchy.T, found.hierarchy.T[1:], strict=False):
        assert len(np.unique(np.stack([fine, coarse], 1), axis=0)) == len(np.unique(fine))
    scores = [
        silhouette_score(tokens, level) if 1 < len(np.unique(level)) < len(tokens) else np.nan
        for level in found.hierarchy.T
    ]
    np.testing.assert_allclose(found.silhouettes, scores)
    if not np.isnan(scores).all():
        assert found.silhouette == np.nanmax(found.silhouettes)
        np.testing.assert_array_equal(found.labels, found.hierarchy[:, int(np.nanargmax(scores))])
    assert found.labels.max() + 1 == len(found.keys)


@settings(deadline=None, max_examples=9)
@given(st.integers(0, 10_000), st.sampled_from(METHODS))
def test_the_order_of_images_does_not_matter_to_the_groups(seed, method):
    tokens, _ = blobs(groups=4, each=12, seed=seed % 7, spread=0.2)
    order = np.random.default_rng(seed).permutation(len(tokens))
    whole, shuffled = (semantic_clusters(t, method, **QUICK[method]) for t in (tokens, tokens[order]))
    assert adjusted_rand_score(whole.labels[order], shuffled.labels) == 1.0


def test_level_n_clusters_and_seed():
    tokens = mixture(0)  # 26, 10, 3
    assert len(semantic_clusters(tokens, level=0)) == 26
    assert len(semantic_clusters(tokens, level=-1)) == 3
    assert len(semantic_clusters(tokens, n_clusters=5)) == 5
    assert len(semantic_clusters(tokens, n_clusters=1)) == 1
    assert len(semantic_clusters(tokens, "kmeans", n_clusters=7)) == 7
    first, second = (semantic_clusters(tokens, "kmeans", n_clusters=7, seed=3) for _ in range(2))
    assert np.array_equal(first.keys, second.keys) and np.array_equal(first.labels, second.labels)


def test_cosine_silhouette_and_normalised_routing():
    tokens, truth = blobs(groups=2, each=20)
    tokens[truth == 1] *= np.linspace(1, 40, 20, dtype=np.float32)[:, None]  # lengths vary, directions do not
    found = semantic_clusters(tokens, metric="cosine", normalise=True, n_clusters=2)
    np.testing.assert_array_equal(found.labels, truth)
    np.testing.assert_array_equal(found.route(1000 * tokens), truth)
    assert np.linalg.norm(found.keys, axis=1).max() <= 1 + 1e-6
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert found.silhouette == pytest.approx(silhouette_score(unit, truth, metric="cosine"), abs=1e-5)


def test_routing_is_by_distance_and_can_differ_from_the_label():
    tokens = np.array([[0.0, 1], [0, 1.2], [0, 9], [5, 9.1], [5, 9.3]], np.float32)
    found = clusters_from_labels(tokens, ["a", "a", "a", "b", "b"])
    distances = np.linalg.norm(tokens[:, None] - found.keys[None], axis=2)
    np.testing.assert_array_equal(found.route(tokens), distances.argmin(1))
    assert found.route(tokens)[2] != found.labels[2]


def test_known_labels_become_groups():
    tokens, truth = blobs(groups=3, each=4)
    found = clusters_from_labels(torch.from_numpy(tokens), [["screw", "cable", "tile"][k] for k in truth])
    assert found.names == ("cable", "screw", "tile")
    assert [found.names[k] for k in found.labels] == [["screw", "cable", "tile"][k] for k in truth]
    assert clusters_from_labels(tokens, ["one"] * len(tokens)).names == ("one",)
    with pytest.raises(ValueError, match="11 labels"):
        clusters_from_labels(tokens, ["x"] * 11)


def test_dbscan_gives_noise_to_the_nearest_key():
    tokens, truth = blobs(groups=2, each=20, spread=0.1)
    stray = tokens[truth == 1].mean(0) * 0.6 + tokens[truth == 0].mean(0) * 0.4
    found = semantic_clusters(np.concatenate([tokens, stray[None]]), "dbscan", eps=1.0)
    assert found.labels[-1] == 1 and len(found) == 2
    assert len(semantic_clusters(tokens, "dbscan", eps=1e-6)) == 1  # only noise


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "tokens",
    [
        np.ones((1, 4), np.float32),
        np.array([[0, 1], [1, 0]], np.float32),
        np.ones((30, 8), np.float32),
        np.zeros((6, 3), np.float32),
        1 + np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32) * 1e-8,
    ],
    ids=["one image", "two images", "alike", "all zero", "alike up to rounding"],
)
def test_nothing_to_separate_is_one_group(method, tokens):
    found = semantic_clusters(tokens, method)
    assert len(found) == 1 and np.isnan(found.silhouette) and found.levels == (1,)
    assert (found.labels == 0).all() and (found.route(tokens) == 0).all()
    np.testing.assert_allclose(found.keys[0], tokens.mean(0), rtol=1e-6)


@settings(deadline=None, max_examples=24)
@given(st.integers(3, 8), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from(METHODS))
def test_small_sets_with_repeats_never_crash(rows, dims, seed, method):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3, size=(rows, dims)).astype(np.float32)
    found = semantic_clusters(tokens, method, **QUICK[method])
    assert isinstance(found, Clusters) and found.labels.shape == (rows,)
    assert found.route(tokens).max() < len(found)


def test_one_group_when_the_best_silhouette_is_low():
    tokens = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    assert len(semantic_clusters(tokens)) > 1
    found = semantic_clusters(tokens, min_silhouette=0.5)
    assert len(found) == 1 and len(found.levels) > 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ward", {}),
        ("finch", {"eps": 1.0}),
        ("finch", {"level": 9}),
        ("finch", {"n_clusters": 100}),
        ("finch", {"n_clusters": 0}),
        ("finch", {"metric": "manhattan"}),
        ("kmeans", {"n_clusters": 1000}),
        ("dbscan", {"eps": -1.0}),
        ("dbscan", {"quantile": 0.0}),
    ],
)
def test_wrong_options_are_refused(method, options):
    with pytest.raises(ValueError, match=next(iter(options), "method")):
        semantic_clusters(mixture(0), method, **options)


def test_wrong_tokens_are_refused():
    tokens = mixture(0)
    tokens[5, 1] = np.nan
    with pytest.raises(ValueError, match="row 5"):
        semantic_clusters(tokens)
    for shape in ((4,), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match="shape"):
            semantic_clusters(np.ones(shape, np.float32))
    zero = mixture(0)
    zero[7] = 0
    with pytest.raises(ValueError, match="row 7"):
        semantic_clusters(zero, normalise=True)
    with pytest.raises(ValueError, match="channels"):
        semantic_clusters(mixture(0)).route(np.ones((2, 999), np.float32))


def clip_tokens(name):
    files = [root / "features" / f"{name}_clip_vitl14_336.npz" for root in data_roots()]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        pytest.skip("the CLIP tokens of the shared data are not here")
    with np.load(file) as data:
        return data["tokens"], data["category"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "levels", "picked", "ari"),
    [("mvtec", (336, 68, 18, 6), 18, 0.935), ("visa", (350, 51, 15, 4), 4, 0.36)],
)
def test_real_clip_tokens(name, levels, picked, ari):
    tokens, category = clip_tokens(name)
    found = semantic_clusters(tokens)
    assert found.levels == levels and len(found) == picked
    assert adjusted_rand_score(category, found.labels) == pytest.approx(ari, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "picked", "ari"), [("mvtec", 19, 0.964), ("visa", 12, 1.0)])
def test_density_merges_no_classes_of_the_real_clip_tokens(name, picked, ari):
    tokens, category = clip_tokens(name)
    found = semantic_clusters(tokens, "hdbscan")
    assert len(found) == picked
    assert adjusted_rand_score(category, found.labels) == pytest.approx(ari, abs=2e-3)


def families(far, near, classes=2, members=40, seed=0):
    """Two families of tight classes: `far` apart, their classes `near` apart, unit noise."""
    rng = np.random.default_rng(seed)
    centres = np.zeros((2 * classes, 12), np.float32)
    for number, centre in enumerate(centres):
        centre[number // classes], centre[2 + number] = far, near
    truth = np.repeat(np.arange(2 * classes), members)
    return centres[truth] + rng.normal(0, 1, (len(truth), 12)).astype(np.float32), truth


def test_density_separates_siblings_that_the_silhouette_merges():
    tokens, truth = families(far=60, near=9)
    silhouettes = {labels: silhouette_score(tokens, truth // labels) for labels in (1, 2)}
    assert silhouettes[2] > silhouettes[1]  # families beat classes, so any rule by the highest silhouette merges
    found = semantic_clusters(tokens, "hdbscan", distance="euclidean")
    assert adjusted_rand_score(truth, found.labels) == 1.0
    assert len(semantic_clusters(tokens, distance="euclidean")) < len(found)


def test_density_gives_noise_to_the_nearest_cluster_and_one_group_to_noise_alone():
    tokens, truth = families(far=30, near=15)
    lonely = tokens[truth == 3].mean(0, keepdims=True) + 12
    found = semantic_clusters(np.concatenate([tokens, lonely]), "hdbscan", distance="euclidean")
    assert found.labels[-1] == found.labels[np.flatnonzero(truth == 3)[0]]
    few = semantic_clusters(tokens[:8], "hdbscan", min_cluster_size=10)
    assert len(few) == 1
    for wrong in ({"min_cluster_size": 1}, {"distance": "manhattan"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            semantic_clusters(tokens, "hdbscan", **wrong)
