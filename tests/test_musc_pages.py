"""What MuSc's pages compute beside the method: variants read from cached distances equal the method itself."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.book import musc_experiments, musc_extensions, musc_tables
from hclib.book.musc_pools import Pool, finished, mutual, pool_scores
from hclib.kernels.distances import patch_to_image
from hclib.kernels.features import Features
from hclib.methods import MuSc, MuScPlus
from hclib.methods.musc import aggregate, mutual_scores, rescore

LAYERS, DEGREES, SIDE = ("a", "b"), (1, 3), 4


def features(images: int, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    maps = {layer: rng.normal(size=(images, SIDE, SIDE, 6)).astype(np.float16) for layer in LAYERS}
    index = pd.DataFrame({"path": [f"{i}.png" for i in range(images)], "defect": "good", "split": "test"})
    encoder = {"name": "random", "image_size": 16}
    return Features(maps, rng.normal(size=(images, 5)).astype(np.float32) + 1, index, encoder)


def pool_of(all_images: Features, tested: int) -> Pool:
    distances = {}
    for layer, maps in all_images.maps.items():
        for degree in DEGREES:
            patches = aggregate(maps, degree)
            distances[layer, degree] = patch_to_image(patches, patches).numpy()
    return Pool(all_images, tested, distances)


@pytest.fixture(scope="module")
def pool():
    return pool_of(features(14), 10)


@settings(deadline=None, max_examples=25)
@given(st.integers(6, 12), st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([0.0, 0.2]), st.integers(0, 99))
def test_mutual_reads_what_mutual_scores_computes(images, fraction, lower, seed):
    if int((images - 1) * fraction) <= int((images - 1) * lower):
        return
    patches = torch.nn.functional.normalize(torch.randn(images, 7, 5, generator=torch.manual_seed(seed)), dim=2)
    distances = patch_to_image(patches, patches).numpy()
    every = np.arange(images)
    for strategy in ("mean", "min", "max"):
        options = {"fraction": fraction, "lower": lower, "strategy": strategy}
        expected = mutual_scores(patches, **options).numpy()
        np.testing.assert_allclose(mutual(distances, every, every, **options), expected, atol=1e-5)


def test_a_part_of_a_pool_scores_as_that_pile_alone(pool):
    part = np.array([0, 2, 3, 5, 6, 9])
    expected = MuSc(degrees=DEGREES).score(pool.features.subset(part))
    found = pool_scores(pool, part, part, degrees=DEGREES)
    np.testing.assert_allclose(found.patch, expected.patch, atol=1e-5)
    np.testing.assert_allclose(found.image, expected.image, atol=1e-5)
    assert found.align_corners and found.sigma == 0


def test_reference_images_of_a_pool_join_as_in_the_method(pool):
    tested, chosen = np.arange(10), np.array([10, 12, 13])
    references = pool.features.subset(chosen)
    joined = MuSc(degrees=DEGREES, references=True).fit(references).score(pool.features.subset(tested))
    found = pool_scores(pool, tested, np.concatenate([tested, chosen]), degrees=DEGREES)
    np.testing.assert_allclose(found.image, joined.image, atol=1e-5)
    alone = MuScPlus(degrees=DEGREES).fit(references).score(pool.features.subset(tested))
    found = pool_scores(pool, tested, chosen, degrees=DEGREES, fraction=1.0, strategy="min")
    np.testing.assert_allclose(found.patch, alone.patch, atol=1e-5)


def test_an_empty_interval_is_an_error(pool):
    with pytest.raises(ValueError, match="of 3 images is empty"):
        pool_scores(pool, np.arange(4), np.arange(4), degrees=DEGREES)


def test_an_interrupted_run_goes_on_with_the_passes_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(musc_experiments, "cache_dir", lambda: tmp_path)
    pile = features(7, seed=1)
    first = musc_experiments.ResumedMuSc(degrees=DEGREES, windows=None).score(pile)
    assert len(list(tmp_path.glob("scores/pass-*.npy"))) == len(LAYERS) * len(DEGREES)
    monkeypatch.setattr(MuSc, "_patch_scores", lambda *_: pytest.fail("computed again"))
    again = musc_experiments.ResumedMuSc(degrees=DEGREES, windows=None).score(pile)
    assert np.array_equal(first.patch, again.patch)
    with pytest.raises(pytest.fail.Exception):
        musc_experiments.ResumedMuSc(degrees=DEGREES, windows=None).score(features(7, seed=2))


@given(st.integers(5, 60), st.integers(1, 5), st.integers(0, 9))
def test_parts_are_a_division_of_nearly_equal_size(count, parts, seed):
    found = musc_experiments.parts_of(count, parts, seed)
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_hits_count_only_anomalous_images_with_a_mask(monkeypatch):
    patch = np.zeros((3, 2, 2), np.float32)
    patch[0, 0, 0] = patch[1, 1, 1] = patch[2, 0, 0] = 1
    masks = np.zeros((2, 2, 2), bool)
    masks[:, 0, 0] = True
    index = pd.DataFrame({"label": [1, 1, 0], "mask_path": ["m", "m", ""]})
    monkeypatch.setattr(musc_experiments, "read_masks", lambda rows, size: masks[: len(rows)])
    assert musc_experiments.defect_hits(patch, index) == 0.5


def test_rescoring_by_group_sees_one_group_at_a_time():
    rng = np.random.default_rng(0)
    image, tokens, groups = rng.random(9), rng.random((9, 4)), np.repeat([0, 1, 2], 3)
    found = musc_extensions.by_group(image, tokens, groups, [1, 2])
    for group in range(3):
        mine = groups == group
        expected = rescore(image[mine], tokens[mine].astype(np.float32), (1, 2), minmax=False)
        np.testing.assert_allclose(found[mine], expected)
    assert musc_extensions.name_of([1]) == "none" and musc_extensions.name_of([1, 0]) == "1,all"


def test_maps_of_turned_images_are_turned_back(monkeypatch):
    """An odd patch off the centre must be found where the upright image has it, whatever the turn."""
    rng, count = np.random.default_rng(0), 8
    common = rng.normal(size=6)
    maps = np.tile(common, (count, SIDE, SIDE, 1)) + 0.01 * rng.normal(size=(count, SIDE, SIDE, 6))
    places = [(i % SIDE, (3 * i + 1) % SIDE) for i in range(count)]
    for i, (y, x) in enumerate(places):
        maps[i, y, x] = rng.normal(size=6) * 3
    upright = features(count)
    upright = Features({"a": maps.astype(np.float32)}, upright.tokens, upright.index, upright.encoder)
    four = np.stack([np.rot90(one, k) for one in maps for k in range(4)]).astype(np.float32)
    all_turns = features(4 * count)
    all_turns = Features({"a": four}, np.repeat(upright.tokens, 4, 0), all_turns.index, upright.encoder)
    monkeypatch.setattr(musc_extensions, "pile", lambda config: upright)
    monkeypatch.setattr(musc_extensions, "_turned", lambda features, config: all_turns)
    seen = []
    monkeypatch.setattr(
        musc_extensions, "measured", lambda scores, index, size: seen.append(scores.patch) or pd.DataFrame({"n": [1]})
    )
    rows = musc_extensions.turned_images(
        {"degrees": [1], "seeds": [0, 1], "image_size": 16, "size": 16, "windows": None}
    )
    assert rows["way"].tolist() == [*musc_extensions.TURNS[:2], *musc_extensions.TURNS[2:] * 2]
    for patch in seen:
        highest = [np.unravel_index(one.argmax(), one.shape) for one in patch]
        assert [tuple(map(int, place)) for place in highest] == places


def test_finished_scores_are_the_method_s(pool):
    part = pool.features.subset(np.arange(8))
    plain = MuSc(degrees=DEGREES, windows=None).score(part)
    expected = MuSc(degrees=DEGREES, windows=(1, 2)).score(part)
    np.testing.assert_allclose(finished(plain.patch, part.tokens, 16, (1, 2)).image, expected.image, atol=1e-6)


def test_published_tables_give_musc_s_own_seven_metrics():
    paper = musc_tables.published_rows(17, "MVTec AD")
    assert paper.shape == (16, 7)
    assert paper.loc["screw"].tolist() == [83.5, 89.4, 91.3, 98.9, 42.9, 37.6, 94.8]
    assert musc_tables.published_rows(14, "BTAD").iloc[0].tolist() == [94.8, 97.3]


def test_a_variant_s_change_stands_beside_the_paper_s():
    rows = [("{1}", 0.90, 0.80), ("{1,3,5}", 0.95, 0.90), ("{9}", 0.5, 0.5)]
    frame = pd.DataFrame(
        [
            {"value": v, "level": level, "auroc": a}
            for v, *both in rows
            for level, a in zip(("image", "pixel"), both, strict=True)
        ]
    )
    table = musc_tables.variant_table(frame, 3, "{1,3,5}")
    assert table.index.tolist() == ["{1}", "{1,3,5}"]
    image = table.loc["{1}", "image AUROC"]
    assert image[["ours", "change", "MVTec AD", "VisA"]].tolist() == [90.0, -5.0, -1.0, 0.2]
    assert image["difference"] == pytest.approx(-4.6)
