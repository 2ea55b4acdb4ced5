"""PatchCore and HierCore on small fabricated features: against brute force, routing, saving, seeds, errors."""

import numpy as np
import pandas as pd
import pytest
import torch

from hclib.kernels.features import Features
from hclib.methods import HierCore, PatchCore


def make_features(counts=(12, 9, 15), *, grid=4, channels=6, seed=0, shift=0.0, first=0):
    """Three well separated products: tokens and patches around a centre each, on scales 1, 2 and 3."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(len(counts), channels)) * 8
    product = np.repeat(np.arange(len(counts)), counts)
    noise = rng.normal(size=(len(product), grid, grid, channels)) * (product + 1)[:, None, None, None] * 0.2
    maps = (centres[product][:, None, None] + noise).astype(np.float16)
    if shift:
        maps[:, 0, 0] += np.float16(shift)  # one anomalous patch an image
    tokens = np.float32(centres[product] + rng.normal(size=(len(product), channels)) * 0.1)
    index = pd.DataFrame(
        {
            "path": [f"image{first + i}.png" for i in range(len(product))],
            "mask_path": "",
            "category": [f"product{k}" for k in product],
            "split": "train",
            "label": 0,
            "defect": "good",
        }
    )
    return Features(
        {"block6": maps}, tokens, index, {"name": "fake", "image_size": 56, "layers": ["block6"], "weights_hash": "0"}
    )


def brute_force(train, test, patch_size=1):
    bank = torch.as_tensor(np.asarray(train.maps["block6"], np.float32)).flatten(0, 2)
    queries = torch.as_tensor(np.asarray(test.maps["block6"], np.float32)).flatten(0, 2)
    return torch.cdist(queries.double(), bank.double()).min(1).values.reshape(len(test), 4, 4).numpy()


def test_patchcore_with_the_whole_bank_is_nearest_neighbour_search():
    train, test = make_features(), make_features(seed=1, shift=4)
    scores = PatchCore(ratio=1.0, patch_size=1).fit(train).score(test)
    np.testing.assert_allclose(scores.patch, brute_force(train, test), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.image, scores.patch.max((1, 2)))
    squared = PatchCore(ratio=1.0, patch_size=1, squared=True).fit(train).score(test)
    np.testing.assert_allclose(squared.patch, scores.patch**2, rtol=1e-4, atol=1e-4)


def test_neighbours_are_averaged():
    train, test = make_features(), make_features(seed=1)
    one, three = (PatchCore(ratio=1.0, neighbors=k).fit(train).score(test).patch for k in (1, 3))
    assert (three >= one - 1e-6).all() and (three > one).any()


@pytest.mark.parametrize("sampler", ["greedy", "random"])
def test_a_coreset_has_its_size_and_comes_from_the_patches(sampler):
    train = make_features()
    bank = PatchCore(ratio=0.1, patch_size=1, sampler=sampler, projection=3).fit(train).bank
    assert len(bank.points) == int(36 * 16 * 0.1)
    patches = np.asarray(train.maps["block6"], np.float32).reshape(-1, 6)
    assert all((patches == point).all(1).any() for point in np.asarray(bank.points))
    assert len(np.unique(np.asarray(bank.points), axis=0)) == len(bank.points)


def test_equal_seeds_give_equal_bytes_and_others_do_not():
    train, test = make_features(), make_features(seed=1)
    a, b, c = (HierCore(seed=s, projection=3).fit(train).score(test).patch.tobytes() for s in (0, 0, 1))
    assert a == b
    assert a != c


def test_hiercore_finds_the_products_and_scores_within_them():
    train, test = make_features(), make_features(seed=1)
    detector = HierCore(ratio=1.0, patch_size=1).fit(train)
    scores = detector.score(test)
    groups = pd.crosstab(test.index["category"], scores.group)
    assert (groups > 0).sum(axis=0).max() == 1  # no group mixes products
    for k in np.unique(scores.group):
        members = np.flatnonzero(detector.route(train.tokens) == k)
        rows = np.flatnonzero(scores.group == k)
        expected = brute_force(train.subset(members), test.subset(rows))
        np.testing.assert_allclose(scores.patch[rows], expected, rtol=1e-4, atol=1e-4)


def test_normalised_tokens_are_routed_normalised(tmp_path):
    train, test = make_features(), make_features(seed=1)
    detector = HierCore(clustering_options={"normalise": True}).fit(train)
    assert np.allclose(np.linalg.norm(detector.keys, axis=1), 1, atol=0.05)
    np.testing.assert_array_equal(detector.route(test.tokens), detector.route(test.tokens * 7))
    detector.save(tmp_path / "d")
    np.testing.assert_array_equal(HierCore.load(tmp_path / "d").route(test.tokens * 7), detector.route(test.tokens))


def test_known_classes_pick_the_bank_and_unknown_ones_are_routed():
    train, test = make_features(), make_features(seed=1)
    detector = HierCore(ratio=1.0, patch_size=1).fit(train, list(train.index["category"]))
    assert detector.names == ["product0", "product1", "product2"]
    labels = list(test.index["category"])
    known, routed = detector.score(test, labels), detector.score(test)
    np.testing.assert_array_equal(known.group, routed.group)
    np.testing.assert_array_equal(known.patch, routed.patch)
    swapped = detector.score(test, ["product2"] * len(test))
    assert set(swapped.group) == {2}
    assert swapped.image[0] > known.image[0]


def test_image_score_of_the_map_is_at_most_that_of_the_patches():
    train, test = make_features(), make_features(seed=1, shift=4)
    patch = HierCore(image_score="max").fit(train).score(test).image
    upsampled = HierCore(image_score="map_max").fit(train).score(test).image
    assert (upsampled <= patch + 1e-6).all()


@pytest.mark.parametrize("kind", [PatchCore, HierCore])
def test_a_saved_detector_scores_the_same_bit_for_bit(kind, tmp_path):
    train, test = make_features(), make_features(seed=1, shift=4)
    detector = kind(seed=3, projection=4, neighbors=2).fit(train)
    detector.save(tmp_path / "detector")
    detector.save(tmp_path / "detector")  # replaces
    loaded = kind.load(tmp_path / "detector")
    assert detector.score(test).patch.tobytes() == loaded.score(test).patch.tobytes()
    assert detector.score(test).image.tobytes() == loaded.score(test).image.tobytes()
    assert sorted(p.name for p in (tmp_path / "detector").iterdir()) == ["detector.json", "tensors.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_a_known_class_detector_keeps_its_names(tmp_path):
    train, test = make_features(), make_features(seed=1)
    labels = list(test.index["category"])
    detector = HierCore().fit(train, list(train.index["category"]))
    detector.save(tmp_path / "d")
    assert (
        detector.score(test, labels).patch.tobytes()
        == HierCore.load(tmp_path / "d").score(test, labels).patch.tobytes()
    )


def test_errors_name_what_is_wrong(tmp_path):
    train, test = make_features(), make_features(seed=1)
    with pytest.raises(RuntimeError, match="fit"):
        PatchCore().score(test)
    with pytest.raises(RuntimeError, match="fit"):
        HierCore().score(test)
    with pytest.raises(ValueError, match="ratio=0"):
        PatchCore(ratio=0).fit(train)
    with pytest.raises(ValueError, match="sampler='best'"):
        PatchCore(sampler="best").fit(train)
    with pytest.raises(ValueError, match="at least one training image"):
        PatchCore().fit(train.subset([]))
    with pytest.raises(ValueError, match="2 labels for 36"):
        HierCore().fit(train, ["a", "b"])
    detector = HierCore().fit(train, list(train.index["category"]))
    with pytest.raises(ValueError, match="product9.*were not in training"):
        detector.score(test, ["product9"] * len(test))
    PatchCore().fit(train).save(tmp_path / "p")
    with pytest.raises(ValueError, match="PatchCore.load"):
        HierCore.load(tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="save"):
        PatchCore.load(tmp_path / "nothing")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="other files"):
        PatchCore().fit(train).save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
