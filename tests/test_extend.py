"""HierCore.extend: a new product arrives; the other banks keep their bytes and equal a rebuild."""

import numpy as np
import pytest
import torch

from hclib.methods import HierCore
from hclib.methods.hiercore import image_tokens
from tests.test_detectors import make_features

LOOSE = {"clustering_options": {"min_silhouette": 0.4}}  # one product alone stays one group


def parts():
    """Return all images of three products, and the rows of the first two and of the third."""
    everything = make_features(counts=(20, 20, 20))
    last = (everything.index["category"] == "product2").to_numpy()
    return everything, everything.subset(~last), everything.subset(last)


def names(features):
    return list(features.index["category"])


def test_with_labels_it_equals_a_rebuild_byte_for_byte():
    everything, old, new = parts()
    rebuilt = HierCore(projection=3).fit(everything, names(everything))
    grown = HierCore(projection=3).fit(old, names(old))
    before = [bank.points.clone() for bank in grown.banks]
    joined = grown.extend(new, names(new))
    assert grown.names == rebuilt.names and set(joined) == {2}
    assert all(torch.equal(a, b.points) for a, b in zip(before, grown.banks, strict=False))
    assert all(torch.equal(a.points, b.points) for a, b in zip(rebuilt.banks, grown.banks, strict=True))
    assert torch.equal(rebuilt.keys, grown.keys) and torch.equal(rebuilt.counts, grown.counts)
    test = make_features(counts=(5, 5, 5), seed=1)
    assert rebuilt.score(test).patch.tobytes() == grown.score(test).patch.tobytes()


def test_a_product_that_sorts_first_leaves_the_others_as_a_rebuild_has_them():
    everything, _, _ = parts()
    first = (everything.index["category"] == "product0").to_numpy()
    old, new = everything.subset(~first), everything.subset(first)
    grown = HierCore(projection=3).fit(old, names(old))
    grown.extend(new, names(new))
    rebuilt = HierCore(projection=3).fit(everything, names(everything))
    assert grown.names == ["product1", "product2", "product0"]
    for name in rebuilt.names:
        a, b = (detector.banks[detector.names.index(name)].points for detector in (grown, rebuilt))
        assert torch.equal(a, b)


def test_without_labels_a_new_product_gets_a_group_and_a_known_one_joins_its_own():
    everything, old, new = parts()
    detector = HierCore(projection=3, **LOOSE).fit(old)
    assert len(detector.keys) == 2
    again = old.subset(np.flatnonzero(old.index["category"] == "product1")[::2])
    before, size = [bank.points.clone() for bank in detector.banks], len(detector.banks[1])
    assert set(detector.extend(again)) == {1} and len(detector.keys) == 2
    assert torch.equal(detector.banks[0].points, before[0])  # untouched
    assert torch.equal(detector.banks[1].points[:size], before[1]) and len(detector.banks[1]) > size
    assert detector.counts.tolist() == [20, 30]
    assert set(detector.extend(new)) == {2}
    np.testing.assert_array_equal(
        detector.route(everything.tokens), np.unique(names(everything), return_inverse=True)[1]
    )
    tokens = torch.as_tensor(everything.tokens[:20])
    assert torch.linalg.vector_norm(tokens - detector.keys[0], dim=1).amax() <= detector.radii[0] + 1e-5


def test_a_key_that_two_visits_made_is_the_mean_of_all_images():
    _, old, _ = parts()
    halves = [old.subset(np.flatnonzero(old.index["category"] == "product0")[part::2]) for part in (0, 1)]
    detector = HierCore(**LOOSE).fit(halves[0])
    detector.extend(halves[1])
    np.testing.assert_allclose(detector.keys[0], old.tokens[:20].mean(0), rtol=1e-5)
    tokens = torch.as_tensor(old.tokens[:20])
    assert torch.linalg.vector_norm(tokens - detector.keys[0], dim=1).amax() <= detector.radii[0] + 1e-5


def test_an_extended_detector_is_saved_whole(tmp_path):
    _, old, new = parts()
    detector = HierCore(**LOOSE).fit(old)
    detector.extend(new)
    detector.save(tmp_path / "d")
    loaded = HierCore.load(tmp_path / "d")
    assert loaded.score(new).patch.tobytes() == detector.score(new).patch.tobytes()
    assert torch.equal(loaded.radii, detector.radii) and torch.equal(loaded.counts, detector.counts)
    loaded.extend(old)
    assert len(loaded.keys) == len(detector.keys)


def test_mixing_labels_and_none_is_refused():
    _, old, new = parts()
    with pytest.raises(RuntimeError, match="fit"):
        HierCore().extend(new)
    with pytest.raises(ValueError, match="extend without labels"):
        HierCore().fit(old).extend(new, names(new))
    with pytest.raises(ValueError, match="extend with labels"):
        HierCore().fit(old, names(old)).extend(new)


def test_semantic_layer_is_the_mean_of_a_feature_map():
    everything, _, _ = parts()
    expected = np.asarray(everything.maps["block6"], np.float32).mean((1, 2))
    np.testing.assert_allclose(image_tokens(everything, "block6"), expected, rtol=1e-5)
    detector = HierCore(semantic_layer="block6").fit(everything, names(everything))
    np.testing.assert_allclose(detector.keys[0], expected[:20].mean(0), rtol=1e-4)
    with pytest.raises(ValueError, match="layer4.*block6"):
        HierCore(semantic_layer="layer4").fit(everything)
