"""Outlier factors against scikit-learn and the definition; SoftPatch's bank, scores, saving and seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import LocalOutlierFactor
from test_detectors import make_features

from hclib.methods import SoftPatch
from hclib.methods.softpatch import outlier_weights


def definition(points, k):
    """Breunig's local outlier factor of (N, C), in plain double precision."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(distances, order, 1)
    density = 1 / (np.maximum(near, near[:, -1][order]).mean(1) + 1e-10)
    return density[order].mean(1) / density


@given(st.integers(2, 40), st.integers(1, 20), st.integers(1, 8), st.integers(0, 99), st.sampled_from([0, 10, 1000]))
@settings(max_examples=50, deadline=None)
def test_weights_are_scikit_learns_factors(images, channels, neighbors, seed, offset):
    patches = torch.randn(3, images, channels, generator=torch.Generator().manual_seed(seed)) + offset
    patches[:, 0] *= 3
    ours = outlier_weights(patches, neighbors)
    for position, points in enumerate(patches.double().numpy()):
        lof = LocalOutlierFactor(n_neighbors=min(neighbors, images - 1)).fit(points)
        np.testing.assert_allclose(ours[position], -lof.negative_outlier_factor_, rtol=1e-5, atol=1e-5)


@given(st.integers(4, 30), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_copies_of_a_patch_are_at_distance_zero(images, neighbors, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(images, 5)).astype(np.float32)
    points[: images // 2] = points[0]
    expected = definition(points.astype(float), min(neighbors, images - 1))
    np.testing.assert_allclose(outlier_weights(torch.from_numpy(points)[None], neighbors)[0], expected, rtol=1e-6)


def test_positions_and_blocks_do_not_matter(monkeypatch, device):
    patches = torch.randn(7, 33, 12, generator=torch.Generator().manual_seed(0)).to(device)
    whole = outlier_weights(patches)
    assert torch.equal(torch.cat([outlier_weights(part[None]) for part in patches]), whole)
    monkeypatch.setattr("hclib.methods.softpatch.HELD", 1000)
    assert torch.allclose(outlier_weights(patches), whole, rtol=1e-12)
    assert whole.shape == (7, 33) and whole.device == patches.device


def test_an_outlier_at_one_position_has_the_largest_weight():
    patches = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(1))
    patches[2, 17] += 5
    weights = outlier_weights(patches)
    assert divmod(int(weights.argmax()), 50) == (2, 17) and weights[2, 17] > 2


@pytest.mark.parametrize(
    ("shape", "neighbors", "message"),
    [((3, 1, 4), 5, "2 images"), ((3, 4), 5, "expected"), ((3, 5, 4), 0, "1 neighbour"), ((0, 5, 4), 5, "expected")],
)
def test_what_is_no_set_of_patches_is_an_error(shape, neighbors, message):
    with pytest.raises(ValueError, match=message):
        outlier_weights(torch.zeros(shape), neighbors)


def test_values_that_are_not_finite_are_an_error():
    patches = torch.randn(2, 9, 3)
    patches[1, 4, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN, infinity"):
        outlier_weights(patches)


def fitted(train, **options):
    return SoftPatch(**{"patch_size": 1, "projection": None, **options}).fit(train)


def test_rejected_patches_never_enter_the_bank():
    train = make_features((40,), shift=0)
    maps = np.array(train.maps["block6"])
    maps[3, 1, 2] += 6  # an outlier at one position of one image
    train.maps["block6"] = maps
    for seed in range(5):
        detector = fitted(train, seed=seed, ratio=1.0)
        factors = detector.weights
        assert factors.argmax() == np.ravel_multi_index((3, 1, 2), factors.shape)
        assert (detector.bank_weights <= detector.limit).all()
        assert not (np.asarray(detector.bank.points) == np.float32(maps[3, 1, 2])).all(1).any()
        assert len(detector.bank) == (factors <= detector.limit).sum()
        assert abs((factors > detector.limit).mean() - 0.15) < 0.01


def test_scores_are_weighted_distances_to_the_nearest_entry():
    train, test = make_features((30,)), make_features((5,), seed=1, shift=4)
    detector = fitted(train, ratio=0.2)
    queries = torch.as_tensor(np.asarray(test.maps["block6"], np.float32)).flatten(0, 2)
    distances = torch.cdist(queries.double(), detector.bank.points.double())
    least, found = distances.min(1)
    expected = least.square() * detector.bank_weights[found]
    np.testing.assert_allclose(detector.score(test).patch.ravel(), expected, rtol=1e-4)
    plain = SoftPatch(patch_size=1, projection=None, ratio=0.2, squared=False).fit(train).score(test)
    np.testing.assert_allclose(plain.patch.ravel(), least * detector.bank_weights[found], rtol=1e-4)
    np.testing.assert_allclose(plain.image, plain.patch.max((1, 2)))


def test_the_coreset_is_a_share_of_all_patches():
    train = make_features((30,))
    assert len(fitted(train, ratio=0.1).bank) == int(30 * 16 * 0.1)


def test_it_survives_contamination_that_an_unweighted_bank_does_not():
    train, test = make_features((60,)), make_features((30,), seed=1, shift=0, first=100)
    for features, rows in ((train, range(4)), (test, range(15))):
        maps = np.array(features.maps["block6"])
        maps[list(rows), 2, 2] += 3
        features.maps["block6"] = maps
    labels = np.arange(30) < 15
    scores = fitted(train, ratio=0.5).score(test).image
    assert scores[labels].min() > scores[~labels].max()
    from hclib.methods import PatchCore

    plain = PatchCore(patch_size=1, ratio=1.0).fit(train).score(test).image
    assert plain[labels].min() < plain[~labels].max()


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path):
    train, test = make_features(), make_features(seed=1)
    a, b, c = (SoftPatch(seed=s, projection=3).fit(train).score(test).patch.tobytes() for s in (0, 0, 1))
    assert a == b != c


def test_a_saved_detector_gives_the_same_scores(tmp_path):
    train, test = make_features(), make_features(seed=1)
    detector = SoftPatch(neighbors=4, projection=3, squared=False).fit(train)
    detector.save(tmp_path / "d")
    loaded = SoftPatch.load(tmp_path / "d")
    assert loaded.score(test).patch.tobytes() == detector.score(test).patch.tobytes()
    assert loaded.neighbors == 4


def test_misuse_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="call fit"):
        SoftPatch().score(make_features())
    with pytest.raises(RuntimeError, match="nothing to save"):
        SoftPatch().save(tmp_path / "d")
    with pytest.raises(ValueError, match="1 training images"):
        SoftPatch().fit(make_features((1,)))
    with pytest.raises(ValueError, match="threshold=1"):
        SoftPatch(threshold=1)
