"""Mutual matches against brute force; channels, what stays out of the bank, scores, saving and seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from test_detectors import brute_force, make_features

from hclib.kernels.maps import upsample
from hclib.methods import InReaCh
from hclib.methods.inreach import mutual_matches


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_matches_are_mutual_nearest_neighbours(images, patches, seeds, origins, number):
    rng = np.random.default_rng(number)
    left, right = rng.normal(size=(images, patches, 5)), rng.normal(size=(seeds, origins, 5))
    match, squared = mutual_matches(torch.from_numpy(left).float(), torch.from_numpy(right).float())
    distances = np.square(left[:, :, None, None] - right).sum(-1)  # (N, P, S, R)
    for n in range(images):
        for s in range(seeds):
            table = distances[n, :, s]
            for p in range(patches):
                q = table[p].argmin()
                mutual = table[:, q].argmin() == p
                assert match[n, p, s] == (q if mutual else -1)
                assert squared[n, p, s] == pytest.approx(table[p, q], rel=1e-4) if mutual else squared[n, p, s].isinf()


def position_features(count=30, seed=0, **options):
    """Images of one product whose patches differ by position, so that channels are positions."""
    features = make_features((count,), seed=seed, **options)
    grid = np.random.default_rng(5).normal(size=(4, 4, 6)) * 3
    features.maps["block6"] = (np.asarray(features.maps["block6"]) + grid).astype(np.float16)
    return features


def fitted(train, **options):
    return InReaCh(**{"patch_size": 1, "seeds": 5, **options}).fit(train)


def test_what_recurs_is_in_and_what_does_not_is_out():
    train = position_features()
    maps = np.array(train.maps["block6"])
    maps[7, 2, 1] += 9
    maps[20, 0, 3] -= 9
    train.maps["block6"] = maps
    for seed in range(4):
        detector = fitted(train, seed=seed)
        assert not detector.member[7, 2, 1] and not detector.member[20, 0, 3]
        assert detector.member.mean() > 0.8
        assert len(detector.bank) == detector.member.sum()
        stored = np.asarray(detector.bank.points)
        assert not (stored == np.float32(maps[7, 2, 1])).all(1).any()


def test_channels_need_members():
    train = position_features(8)
    assert fitted(train, members=3).member.any()
    with pytest.raises(ValueError, match="lower `members`"):
        fitted(train, members=100)


def test_members_far_from_their_channel_are_dropped():
    train = position_features(60)
    loose, tight = fitted(train), fitted(train, spread=1.0)
    assert loose.member.sum() > tight.member.sum() > 0
    assert (loose.member | ~tight.member).all()


def test_scores_are_squared_distances_smoothed_at_the_encoders_size():
    train, test = position_features(), position_features(6, seed=1, shift=4)
    scores = fitted(train).score(test)
    member = fitted(train).member
    bank = np.asarray(train.maps["block6"], np.float32)[member]
    queries = np.asarray(test.maps["block6"], np.float32).reshape(-1, 6)
    expected = np.square(queries[:, None] - bank[None]).sum(2).min(1)
    np.testing.assert_allclose(scores.patch.ravel(), expected, rtol=1e-3, atol=1e-4)
    maps = upsample(scores.patch, test.encoder["image_size"])
    smoothed = [gaussian_filter(m, 13, mode="reflect", truncate=4).max() for m in maps]
    np.testing.assert_allclose(scores.image, smoothed, rtol=1e-4)
    plain = fitted(train, squared=False).score(test)
    np.testing.assert_allclose(plain.patch**2, scores.patch, rtol=1e-3, atol=1e-4)
    assert (scores.patch >= brute_force(train, test) ** 2 - 1e-3).all()


def test_a_coreset_of_the_channels_may_be_kept():
    train = position_features()
    whole, part = fitted(train), fitted(train, ratio=0.2, projection=None)
    assert len(part.bank) == int(len(whole.bank) * 0.2)
    stored = np.asarray(whole.bank.points)
    assert all((stored == point).all(1).any() for point in np.asarray(part.bank.points))


def test_equal_seeds_give_equal_bytes_and_others_other_seed_images():
    train, test = position_features(), position_features(6, seed=1)
    a, b, c = (fitted(train, seed=s, ratio=0.5, projection=3) for s in (0, 0, 1))
    assert a.score(test).patch.tobytes() == b.score(test).patch.tobytes()
    assert not np.array_equal(a.seed_images, c.seed_images)
    assert len(set(a.seed_images)) == 5


def test_blocks_do_not_matter(monkeypatch):
    train = position_features()
    whole = fitted(train).member
    monkeypatch.setattr("hclib.methods.inreach.HELD", 1)
    assert np.array_equal(fitted(train).member, whole)


def test_a_saved_detector_gives_the_same_scores(tmp_path):
    train, test = position_features(), position_features(6, seed=1)
    detector = fitted(train)
    detector.save(tmp_path / "d")
    loaded = InReaCh.load(tmp_path / "d")
    assert loaded.score(test).image.tobytes() == detector.score(test).image.tobytes()
    assert loaded.channels == detector.channels > 0


def test_misuse_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="call fit"):
        InReaCh().score(position_features())
    with pytest.raises(RuntimeError, match="nothing to save"):
        InReaCh().save(tmp_path / "d")
    with pytest.raises(ValueError, match="1 training images"):
        InReaCh().fit(position_features(1))
    with pytest.raises(ValueError, match="seeds=0"):
        InReaCh(seeds=0)
