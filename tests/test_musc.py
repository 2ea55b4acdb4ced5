"""MuSc's three steps against their definitions, the detectors on fabricated features, and the cost of MSM."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.kernels.features import Features
from hclib.methods import musc
from hclib.methods.musc import MuSc, MuScPlus, aggregate, mutual_scores, rescore


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, common=0.7):
    """Unit vectors that share a direction, as real patch tokens do."""
    rng = generator(seed)
    return F.normalize(torch.randn(*shape, generator=rng) + common * torch.randn(shape[-1], generator=rng), dim=-1)


def brute_distances(features, others):
    """Eq. 1 by the letter, in float64 and from differences: (N, P, M)."""
    pairs = features.double().cpu()[:, None], others.double().cpu()[None]
    return torch.cdist(*pairs, compute_mode="donot_use_mm_for_euclid_dist").amin(3).transpose(1, 2)


def brute_mutual(features, fraction=0.3, lower=0.0, strategy="mean", references=None):
    pile = features if references is None else torch.cat([features, references])
    table = brute_distances(features, pile)
    scores = []
    for i, row in enumerate(table):
        others = torch.cat([row[:, :i], row[:, i + 1 :]], dim=1).sort(dim=1).values
        part = others[:, int(others.shape[1] * lower) : int(others.shape[1] * fraction)]
        scores.append({"mean": part.mean(1), "min": part[:, 0], "max": part[:, -1]}[strategy])
    return torch.stack(scores)


# ---- LNAMD


@pytest.mark.parametrize("degree", [1, 3, 5])
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_aggregate_is_layer_norm_then_unfold_and_pooling(degree, grid, device):
    tokens = 3 + 5 * torch.randn(19, *grid, 6, generator=generator())
    flat = tokens.double().flatten(1)
    normal = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    patches = F.unfold(normal.view(tokens.shape).permute(0, 3, 1, 2), degree, padding=degree // 2)
    patches = patches.unflatten(1, (6, degree**2)).permute(0, 3, 1, 2)  # (N, P, C, r * r)
    pooled = F.adaptive_avg_pool1d(patches.flatten(2), 6)  # the reference program's way to C values
    result = aggregate(tokens.to(device), degree)
    assert result.dtype == torch.float32 and result.device.type == device.type
    torch.testing.assert_close(result.cpu().double(), F.normalize(pooled, dim=2), atol=2e-6, rtol=0)


def test_aggregate_reads_memory_maps_and_no_image_depends_on_another(tmp_path):
    values = np.random.default_rng(0).normal(size=(18, 5, 5, 8)).astype(np.float16)
    np.save(tmp_path / "map.npy", values)
    mapped = np.load(tmp_path / "map.npy", mmap_mode="r")
    result = aggregate(mapped, 3)
    torch.testing.assert_close(result, aggregate(torch.from_numpy(values), 3), atol=0, rtol=0)
    torch.testing.assert_close(result[7:8], aggregate(mapped[7:8], 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("degree", [0, 2, -1])
def test_aggregate_refuses_even_degrees(degree):
    with pytest.raises(ValueError, match="odd side"):
        aggregate(torch.zeros(2, 4, 4, 3), degree)


# ---- MSM


@pytest.mark.parametrize("images", [5, 12, 23])
def test_mutual_scores_equal_the_definition(images, device):
    features = unit(images, 9, 16, seed=images)
    scores = mutual_scores(features.to(device))
    assert scores.shape == (images, 9) and scores.dtype == torch.float32 and scores.device.type == device.type
    assert (scores.cpu() - brute_mutual(features)).abs().max() < 1e-5


@pytest.mark.parametrize("held", [0, 500, musc.HELD])
def test_blocks_and_held_directions_do_not_change_scores(held, monkeypatch):
    features, references = unit(23, 9, 16), unit(7, 9, 16, seed=5)
    monkeypatch.setitem(musc.ROWS, "cpu", 20)  # two images a block
    for extra in (None, references):
        scores = mutual_scores(features, references=extra, held=held)
        assert (scores - brute_mutual(features, references=extra)).abs().max() < 1e-5


def test_each_pair_of_blocks_is_multiplied_once_unless_memory_forbids(monkeypatch):
    calls = []
    kept = musc._squared
    monkeypatch.setattr(musc, "_squared", lambda *args: calls.append(1) or kept(*args))
    monkeypatch.setitem(musc.ROWS, "cpu", 9)
    mutual_scores(unit(10, 9, 16))
    assert len(calls) == 10 * 11 // 2
    calls.clear()
    mutual_scores(unit(10, 9, 16), held=0)
    assert len(calls) == 10 * 10


@pytest.mark.parametrize("strategy", ["mean", "min", "max"])
@pytest.mark.parametrize(("lower", "fraction"), [(0.0, 0.3), (0.0, 1.0), (0.1, 0.3), (0.25, 0.5)])
def test_strategies_and_intervals(strategy, lower, fraction):
    features = unit(21, 6, 8)
    scores = mutual_scores(features, fraction, lower=lower, strategy=strategy)
    assert (scores - brute_mutual(features, fraction, lower, strategy)).abs().max() < 1e-5


@given(seed=st.integers(0, 2**16), images=st.integers(5, 12), channels=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_scores_follow_the_images_and_scale_with_the_features(seed, images, channels):
    features = torch.randn(images, 4, channels, generator=generator(seed)) * 7 + 3
    scores = mutual_scores(features)
    order = torch.randperm(images, generator=generator(seed))
    patches = torch.randperm(4, generator=generator(seed + 1))
    torch.testing.assert_close(mutual_scores(features[order]), scores[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mutual_scores(features[:, patches]), scores[:, patches], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mutual_scores(features * 3), scores * 3, atol=1e-3, rtol=1e-4)
    assert (mutual_scores(features, 1.0) >= scores - 1e-5).all()  # more distant images can only add


def test_an_image_does_not_score_itself_and_copies_score_nothing():
    features = unit(9, 4, 12)
    assert mutual_scores(features).min() > 0.05
    copies = features[:3].repeat(3, 1, 1)  # each image three times: int(8 * 0.3) = 2 copies are nearest
    assert mutual_scores(copies).abs().max() == 0


def test_a_strange_patch_stands_out_and_a_broken_kernel_would_show():
    features = unit(12, 9, 16, common=3)
    features[4, 7] = -features[4, 7]
    scores = mutual_scores(features)
    assert scores.flatten().argmax() == 4 * 9 + 7
    assert (brute_mutual(features.roll(1, 0)) - scores).abs().max() > 0.01


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_fewer_than_five_images_are_an_error_not_nan(images):
    with pytest.raises(ValueError, match="at least 5"):
        mutual_scores(unit(images, 4, 8))


def test_other_intervals_need_other_numbers_of_images():
    assert torch.isfinite(mutual_scores(unit(2, 4, 8), 1.0)).all()
    assert torch.isfinite(mutual_scores(unit(2, 4, 8), references=unit(3, 4, 8, seed=1))).all()
    with pytest.raises(ValueError, match="at least 11"):
        mutual_scores(unit(10, 4, 8), 0.1)
    with pytest.raises(ValueError, match="lower < fraction"):
        mutual_scores(unit(10, 4, 8), 0.3, lower=0.3)


def test_bad_features_are_named():
    features = unit(6, 4, 8)
    features[3, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="features: patch 2 of image 3"):
        mutual_scores(features)
    features[3, 2, 0] = torch.inf
    with pytest.raises(ValueError, match="references: patch 2 of image 3"):
        mutual_scores(unit(6, 4, 8), references=features)
    with pytest.raises(ValueError, match=r"\(N, P, C\)"):
        mutual_scores(unit(6, 8))
    with pytest.raises(ValueError, match="alike"):
        mutual_scores(unit(6, 4, 8), references=unit(6, 4, 9))
    with pytest.raises(ValueError, match="strategy"):
        mutual_scores(unit(6, 4, 8), strategy="median")


def test_half_precision_has_a_bounded_error(device):
    features = unit(20, 64, 96).to(device)
    error = (mutual_scores(features, half=True) - mutual_scores(features)).abs().max()
    assert 0 < error < 2e-3
    large = features * 1e4  # beyond float16 without scaling
    assert (mutual_scores(large, half=True) - mutual_scores(large)).abs().max() < 2e1


# ---- RsCIN


def eq5(scores, tokens, windows):
    """Eqs. 4 and 5 with the matrices written out; `windows` without the paper's own term C."""
    similarity = tokens @ tokens.T
    total = scores.copy()
    for k in windows:
        mask = np.zeros_like(similarity)
        for i, row in enumerate(similarity):
            mask[i, np.argsort(-row)[:k]] = 1
        degree = np.diag((mask * similarity).sum(1))
        total = total + np.linalg.inv(degree) @ (mask * similarity) @ scores
    return total / (len(windows) + 1)


def eq7(scores, tokens, k1, k2):
    """The expanded form of the appendix, Eqs. 6 to 8, image by image."""
    result = []
    for i, token in enumerate(tokens):
        w = np.array([token @ other for other in tokens])
        near = np.argsort(-w)
        total = scores[i] / 3
        for j in range(k2):
            weight = w[near[j]] / w[near[:k2]].sum()
            if j < k1:
                weight += w[near[j]] / w[near[:k1]].sum()
            total += weight * scores[near[j]] / 3
        result.append(total)
    return np.array(result)


def positive_tokens(count, seed=0):
    tokens = np.random.default_rng(seed).normal(size=(count, 6)) + 1.5
    return tokens / np.linalg.norm(tokens, axis=1, keepdims=True)


@pytest.mark.parametrize(("k1", "k2"), [(2, 3), (8, 9)])
def test_rescore_is_equation_5_and_its_expansion(k1, k2):
    scores, tokens = np.random.default_rng(1).random(15), positive_tokens(15)
    expected = eq5(scores, tokens, (k1, k2))
    np.testing.assert_allclose(eq7(scores, tokens, k1, k2), expected, atol=1e-12)
    np.testing.assert_allclose(rescore(scores, tokens, (1, k1, k2), minmax=False), expected, atol=1e-12)
    assert np.abs(rescore(scores, tokens[::-1].copy(), (1, k1, k2), minmax=False) - expected).max() > 1e-3


def test_rescore_stretches_first_as_the_reference_program_does():
    scores, tokens = np.random.default_rng(1).random(15) * 9 + 4, positive_tokens(15)
    stretched = (scores - scores.min()) / (scores.max() - scores.min())
    np.testing.assert_allclose(rescore(scores, tokens), eq5(stretched, tokens, (2, 3)), atol=1e-12)
    plain = rescore(scores, tokens, minmax=False)
    back = (plain - scores.min()) / (scores.max() - scores.min())
    np.testing.assert_allclose(rescore(scores, tokens), back, atol=1e-12)


@given(seed=st.integers(0, 2**16), count=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_rescore_averages(seed, count):
    scores, tokens = np.random.default_rng(seed).normal(size=count), positive_tokens(count, seed) * 3
    result = rescore(scores, tokens, (1, 4, math.inf), minmax=False)
    assert (result >= scores.min() - 1e-9).all() and (result <= scores.max() + 1e-9).all()
    np.testing.assert_allclose(rescore(scores, tokens, (1,), minmax=False), scores, atol=1e-12)
    order = np.random.default_rng(seed).permutation(count)
    np.testing.assert_allclose(rescore(scores[order], tokens[order], (1, 4, math.inf), minmax=False), result[order])


def test_rescore_keeps_kinds_handles_ties_and_names_what_is_wrong():
    scores, tokens = torch.rand(6, generator=generator()), torch.ones(6, 3)
    assert rescore(scores, tokens).dtype == torch.float32 and isinstance(rescore(scores, tokens), torch.Tensor)
    assert rescore(scores.numpy(), tokens.numpy()).dtype == np.float32
    torch.testing.assert_close(rescore(scores, tokens, (1,), minmax=False), scores)  # itself before equal tokens
    assert (rescore(torch.full((6,), 0.4), tokens) == 0).all()
    long = tokens * torch.arange(1, 7)[:, None]  # dot products alone prefer the longest token
    torch.testing.assert_close(rescore(scores, long, (1,), normalise=False, minmax=False), scores[5].expand(6))
    with pytest.raises(ValueError, match="windows"):
        rescore(scores, tokens, ())
    with pytest.raises(ValueError, match="expected"):
        rescore(scores, tokens[:4])
    with pytest.raises(ValueError, match="sum to 0 or less"):
        rescore(scores[:2], torch.tensor([[1.0, 0], [-1, 0]]), (2,))


# ---- the detectors


def make_features(counts=(12, 9, 15), *, seed=0, defects=1, layers=None, split="test"):
    """Products far from one another; each one's first `defects` images hold one strange patch."""
    layers = layers or {"block3": 4, "block6": 4}
    rng, world = np.random.default_rng(seed), np.random.default_rng(99)
    product = np.repeat(np.arange(len(counts)), counts)
    first = np.concatenate([np.arange(count) < defects for count in counts])
    maps = {}
    for layer, side in layers.items():
        looks = world.normal(size=(len(counts), side, side, 8)) * 2
        values = looks[product] + rng.normal(size=(len(product), side, side, 8)) * 0.3
        values[first, -1, 0] = rng.normal(size=(first.sum(), 8)) * 4
        maps[layer] = values.astype(np.float16)
    tokens = np.float32(world.normal(size=(len(counts), 5))[product] * 4 + rng.normal(size=(len(product), 5)) * 0.1)
    index = pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(len(product))],
            "mask_path": "",
            "category": [f"product{k}" for k in product],
            "split": split,
            "label": first.astype(int),
            "defect": np.where(first, "spot", "good"),
        }
    )
    return Features(
        maps, tokens, index, {"name": "fake", "image_size": 28, "layers": list(layers), "weights_hash": "0"}
    )


def by_hand(test, rows, degrees=(1, 3, 5), references=None):
    """Eq. 3 for some rows of features whose layers share one grid."""
    total = 0
    for maps in test.maps.values():
        for degree in degrees:
            extra = None if references is None else aggregate(references, degree)
            total = total + brute_mutual(aggregate(maps[rows], degree), references=extra)
    return (total / (len(test.maps) * len(degrees))).numpy().reshape(len(rows), 4, 4)


def test_musc_is_the_mean_over_layers_and_degrees_of_one_pile():
    test = make_features((12, 9))
    scores = MuSc(windows=None).score(test)
    np.testing.assert_allclose(scores.patch, by_hand(test, np.arange(21)), atol=1e-5)
    assert (scores.group == -1).all()
    maps = F.interpolate(torch.from_numpy(scores.patch)[:, None], 28, mode="bilinear", align_corners=True)[:, 0]
    np.testing.assert_allclose(scores.upsample(28), maps, atol=1e-6)
    np.testing.assert_allclose(scores.image, maps.amax((1, 2)), atol=1e-6)
    largest = MuSc(windows=None, image_score="max").score(test)
    np.testing.assert_allclose(largest.image, scores.patch.max((1, 2)), atol=1e-6)
    rescored = MuSc().fit(test).score(test)
    np.testing.assert_allclose(rescored.image, rescore(scores.image, test.tokens, minmax=False), atol=1e-6)
    np.testing.assert_array_equal(rescored.patch, scores.patch)


@pytest.mark.parametrize("known", [True, False])
def test_groups_are_scored_apart_and_find_their_defects(known):
    test = make_features()
    category = test.index["category"].tolist()
    detector = MuSc(windows=None, groups=None if known else "finch")
    scores = detector.score(test, category if known else None)
    assert len(np.unique(scores.group)) == 3 == len({*zip(category, scores.group.tolist(), strict=True)})
    for name in set(category):
        rows = np.flatnonzero(test.index["category"] == name)
        np.testing.assert_allclose(scores.patch[rows], by_hand(test, rows), atol=1e-5)
        assert test.index["label"].iloc[rows[scores.image[rows].argmax()]] == 1
    rescored = MuSc(groups="finch").score(test)
    for rows in (np.flatnonzero(scores.group == k) for k in range(3)):
        expected = rescore(scores.image[rows], test.tokens[rows], minmax=False)
        np.testing.assert_allclose(rescored.image[rows], expected, atol=1e-6)


def test_clusters_too_small_to_be_scored_join_the_nearest():
    test = make_features((12, 3, 9))
    group = MuSc(windows=None, degrees=(1,), groups="finch").score(test).group
    assert len(np.unique(group)) == 2 and len(np.unique(group[12:15])) == 1
    assert len(np.unique(MuSc(degrees=(1,), groups="finch", subsets=5).score(make_features((12, 9, 9))).group)) == 1


def test_subsets_are_seeded_and_may_be_stratified():
    test = make_features((20,), defects=6)
    detector = MuSc(subsets=2, windows=None)
    parts = detector._divide(np.arange(20), test)
    assert sorted(np.concatenate(parts)) == list(range(20)) and [len(part) for part in parts] == [10, 10]
    scores = detector.score(test)
    for rows in parts:
        np.testing.assert_allclose(scores.patch[rows], by_hand(test, rows), atol=1e-5)
    assert scores.patch.tobytes() == MuSc(subsets=2, windows=None).score(test).patch.tobytes()
    assert scores.patch.tobytes() != MuSc(subsets=2, windows=None, seed=1).score(test).patch.tobytes()
    even = MuSc(subsets=3, stratify="defect")._divide(np.arange(20), test)
    assert [(part < 6).sum() for part in even] == [2, 2, 2]


def test_reference_images_join_the_scoring_of_their_class():
    test, train = make_features((7, 3)), make_features((4, 5), seed=3, defects=0, split="train")
    category = test.index["category"].tolist()
    named = MuSc(references=True, windows=None).fit(train, train.index["category"].tolist()).score(test, category)
    routed = MuSc(references=True, windows=None).fit(train).score(test, category)
    np.testing.assert_array_equal(named.patch, routed.patch)
    for name in ("product0", "product1"):
        rows, helpers = (np.flatnonzero(part.index["category"] == name) for part in (test, train))
        total = sum(
            brute_mutual(aggregate(test.maps[layer][rows], r), references=aggregate(train.maps[layer][helpers], r))
            for layer in test.maps
            for r in (1, 3, 5)
        )
        np.testing.assert_allclose(named.patch[rows].reshape(len(rows), -1), total / 6, atol=1e-5)
    pile = MuSc(references=True, windows=None).fit(train).score(test)
    assert (pile.group == -1).all() and np.abs(pile.patch - named.patch).max() > 0.01
    ignored = MuSc(windows=None).fit(train).score(test)
    np.testing.assert_array_equal(ignored.patch, MuSc(windows=None).score(test).patch)


def test_musc_plus_measures_the_nearest_reference_patch():
    test, train = make_features((3,)), make_features((4,), seed=3, defects=0, split="train")
    scores = MuScPlus(windows=None).fit(train).score(test)
    total = sum(
        brute_distances(aggregate(test.maps[layer], r), aggregate(train.maps[layer], r)).amin(2)
        for layer in test.maps
        for r in (1, 3, 5)
    )
    np.testing.assert_allclose(scores.patch.reshape(3, -1), total / 6, atol=1e-5)
    assert scores.image.argmax() == 0
    named = MuScPlus().fit(train, ["product9"] * 4)
    with pytest.raises(ValueError, match="no reference images"):
        named.score(test, ["product0"] * 3)


def test_layers_of_several_grids_meet_on_the_finest():
    test = make_features((8,), layers={"reduction8": 6, "reduction16": 3})
    both = MuSc(degrees=(1,), windows=None).score(test)
    fine, coarse = (
        MuSc(degrees=(1,), windows=None).score(Features({name: maps}, test.tokens, test.index, test.encoder))
        for name, maps in test.maps.items()
    )
    np.testing.assert_allclose(both.patch, (fine.patch + coarse.upsample(6)) / 2, atol=1e-6)


def test_rows_of_features_that_are_read_lazily_score_as_themselves():
    test = make_features((12, 9))
    rows = np.random.default_rng(0).permutation(21)[:11]
    np.testing.assert_allclose(MuSc(windows=None).score(test.subset(rows)).patch, by_hand(test, rows), atol=1e-5)


def test_detector_errors_say_what_to_do():
    test = make_features((6, 3))
    with pytest.raises(ValueError, match="at least 5"):
        MuSc().score(test, test.index["category"].tolist())
    with pytest.raises(ValueError, match="at least 5"):
        MuSc(subsets=3).score(test)
    with pytest.raises(ValueError, match="one class name each"):
        MuSc().score(test, ["product0"])
    with pytest.raises(RuntimeError, match=r"MuScPlus .* fit\(train\)"):
        MuScPlus().score(test)
    with pytest.raises(ValueError, match="stratify"):
        MuSc(stratify="label")


# ---- what it costs


def each_against_all(features, image, fraction=0.3):
    """What the symmetric kernel is compared with: one image against all others by torch.cdist."""
    images, patches, channels = features.shape
    table = torch.cdist(features[image], features.view(-1, channels)).view(patches, images, patches).amin(2)
    table[:, image] = torch.inf
    return table.topk(int((images - 1) * fraction), dim=1, largest=False).values.mean(1)


@pytest.mark.slow
def test_mutual_scores_take_about_half_the_time_of_cdist():
    """CPU seconds of one thread: wall time on a shared machine would measure the neighbours."""
    features = unit(100, 256, 384)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for turn in range(3):
            start = time.process_time()
            rows = [each_against_all(features, image) for image in range(turn, 100, 20)]
            middle = time.process_time()
            scores = mutual_scores(features)
            ratios.append(20 * (middle - start) / (time.process_time() - middle))
            assert (scores[turn::20] - torch.stack(rows)).abs().max() < 1e-4
    finally:
        torch.set_num_threads(before)
    print(f"each image against all by torch.cdist takes {sorted(ratios)} times as long")
    assert sorted(ratios)[1] > 1.5


PEAK = """
import re, sys, torch
sys.path.insert(0, {folder!r})
from test_musc import each_against_all, mutual_scores, unit

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def extra(function, *args):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
    start = status("VmRSS")
    function(*args)
    return status("VmHWM") - start

torch.set_num_threads(2)
small, features = unit(10, 256, 384), unit(100, 256, 384)
mutual_scores(small), each_against_all(small, 0)  # libraries take their own memory once
print(extra(mutual_scores, features), extra(each_against_all, features, 3))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's resettable high-water mark")
def test_mutual_scores_need_a_quarter_of_the_memory_of_cdist():
    script = PEAK.format(folder=os.path.dirname(__file__))
    # the allocator gives freed blocks back at once, so that none of an earlier call is reused unseen
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | allocator)
    ours, theirs = map(float, result.stdout.split())
    print(f"extra MiB: {ours:.1f} against {theirs:.1f}")
    assert ours < theirs / 4
