"""FUN-AD: its losses against their definitions, pseudo-labels, resuming, choosing an epoch, saving, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detectors import make_features

from hclib.methods import FunAD
from hclib.methods.funad_inputs import Inputs, Preparation, join
from hclib.methods.funad_network import (
    Network,
    balanced_loss,
    mutual_pairs,
    mutual_smoothness,
    nearest_squared,
    rescale,
)

QUICK = {"epochs": 6, "learning_rate": 1e-3, "hidden": (16, 8), "batch_size": 8, "refresh": None}


def contaminated(count=40, bad=6, seed=0, first=0):
    """Images of one product; in the first `bad` ones a 2 x 2 block of patches is foreign, and labelled so."""
    features = make_features((count,), seed=seed, first=first, channels=8)
    maps = np.array(features.maps["block6"])
    maps[:bad, 1:3, 1:3] += np.random.default_rng(7).normal(size=8).astype(np.float16) * 4
    features.maps["block6"] = maps
    features.index.loc[: bad - 1, "label"] = 1 if bad else 0
    truth = np.zeros((count, 4, 4), bool)
    truth[:bad, 1:3, 1:3] = True
    return features, truth


def image_auroc(scores, features):
    label = features.index["label"].to_numpy()
    return (scores.image[label == 1][:, None] > scores.image[label == 0]).mean()


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_smoothness_is_half_the_mean_difference_over_mutual_pairs(count, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    features, scores = torch.randn(count, channels, generator=generator), torch.rand(count, generator=generator)
    distances = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    pairs = [
        (i, j)
        for i in range(count)
        for j in range(i)
        if distances[i].argmin() == j and distances[j].argmin() == i and count > 1
    ]
    expected = sum(abs(float(scores[i] - scores[j])) / 2 for i, j in pairs) / len(pairs) if pairs else 0.0
    assert float(mutual_smoothness(features, scores)) == pytest.approx(expected, abs=1e-6)
    partner = mutual_pairs(features)
    assert {(max(i, j), min(i, j)) for i, j in enumerate(partner.tolist()) if j >= 0} == set(pairs)
    midpoint = sum(
        abs(float(scores[i] - (scores[i] + scores[partner[i]]) / 2)) for i in range(count) if partner[i] >= 0
    )
    assert midpoint == pytest.approx(2 * len(pairs) * expected, abs=1e-5)  # the program's form


def test_smoothness_moves_scores_and_not_features():
    features, scores = torch.randn(12, 3, requires_grad=True), torch.rand(12, requires_grad=True)
    mutual_smoothness(features, scores).backward()
    assert features.grad is None and scores.grad.abs().sum() > 0


def test_both_sides_of_the_loss_weigh_the_same():
    scores, labels = torch.tensor([0.9, 0.2, 0.2, 0.2]), torch.tensor([True, False, False, False])
    assert float(balanced_loss(scores, labels)) == pytest.approx(-math.log(0.9) - math.log(0.8), rel=1e-5)
    assert float(balanced_loss(scores, torch.zeros(4, dtype=torch.bool))) == pytest.approx(
        -(3 * math.log(0.8) + math.log(0.1)) / 4, rel=1e-5
    )


def test_rescaling_reaches_both_ends_and_survives_equal_values():
    assert rescale(torch.tensor([3.0, 5.0, 4.0])).tolist() == [0, 1, 0.5]
    assert rescale(torch.tensor([2.0, 2.0])).tolist() == [0, 0]


@given(st.integers(1, 20), st.integers(2, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_nearest_other_vector(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = torch.randn(size, 4, generator=generator), torch.randn(count, 4, generator=generator)
    own = torch.randint(-1, size, (count,), generator=generator)
    queries = torch.where((own >= 0)[:, None], bank[own], queries)
    distances = torch.cdist(queries.double(), bank.double()).square()
    distances[own >= 0, own[own >= 0]] = torch.inf
    values, indices = nearest_squared(queries, bank, own=own)
    assert torch.equal(indices, distances.argmin(1))
    assert torch.allclose(values.double(), distances.amin(1), atol=1e-4)


def test_inputs_join_token_and_patch_and_may_be_reduced():
    train, _ = contaminated()
    joined = join(train, np.arange(3))
    assert joined.shape == (3, 16, 16)
    assert torch.allclose(joined.mean(2), torch.zeros(3, 16), atol=1e-5)
    whole, few = Preparation.learn(train, None, 0), Preparation.learn(train, 5, 0)
    assert whole.channels == 16 and few.channels == 5
    device = torch.device("cpu")
    kept, read = Inputs([train, train], few, device), Inputs([train, train], few, device, keep=False)
    rows, numbers = torch.tensor([3, 41, 7]), torch.tensor([0, 17, 18, 700, 1279])
    assert kept[rows].shape == (48, 5) and len(kept) == 80
    torch.testing.assert_close(kept[rows], read[rows])
    torch.testing.assert_close(kept.at(numbers), read.at(numbers))
    torch.testing.assert_close(kept.at(numbers), torch.cat([kept[n[None] // 16][n % 16][None] for n in numbers]))
    spread = Inputs([train], whole, device)[torch.arange(40)].square().mean().sqrt()
    assert float(spread) == pytest.approx(1, abs=0.05)
    distances = torch.cdist(
        Inputs([train], Preparation.learn(train, 16, 0), device)[torch.arange(2)], torch.zeros(1, 16)
    )
    plain = torch.cdist(Inputs([train], whole, device)[torch.arange(2)], torch.zeros(1, 16))
    torch.testing.assert_close(distances, plain, rtol=1e-3, atol=1e-3)  # all components: a rotation


def test_training_finds_the_contamination():
    train, truth = contaminated()
    test, _ = contaminated(20, 10, seed=1, first=100)
    detector = FunAD(**{**QUICK, "epochs": 30}).fit(train, truth=truth)
    scores = detector.score(test)
    assert image_auroc(scores, test) > 0.95
    assert scores.patch.shape == (20, 4, 4) and ((scores.patch > 0) & (scores.patch < 1)).all()
    np.testing.assert_array_equal(scores.image, scores.patch.max((1, 2)))
    first, last = detector.history[0], detector.history[-1]
    assert last["loss"] < first["loss"] and last["memory_purity"] > 0.99
    assert last["precision"] > 0.5  # by chance: 0.04; a batch without anomalies has wrong pseudo-labels only
    assert 0 < last["pseudo_anomalous"] < 0.3 and len(detector.history) == 30


def test_truth_is_measured_with_and_never_learned_from():
    train, truth = contaminated()
    blind = make_features((40,), channels=8)
    blind.maps["block6"] = train.maps["block6"]
    del blind.index["label"]
    a, b = FunAD(**QUICK).fit(train, truth=truth), FunAD(**QUICK).fit(blind)
    assert a.score(train).patch.tobytes() == b.score(train).patch.tobytes()
    assert math.isnan(b.history[0]["precision"])


def test_equal_seeds_give_equal_bytes_and_leave_the_global_generators_alone():
    train, _ = contaminated()
    state = torch.get_rng_state()
    a, b, c = (FunAD(**QUICK, seed=s, width=6).fit(train).score(train).patch.tobytes() for s in (0, 0, 1))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options", [{"refresh": 1}, {"tokens": 5}, {"memory_patches": 30}, {"smoothness": 0}, {"certain_threshold": 0}]
)
def test_every_option_changes_the_result(options):
    train, _ = contaminated()
    plain = FunAD(**QUICK).fit(train).score(train).patch
    assert not np.array_equal(FunAD(**{**QUICK, **options}).fit(train).score(train).patch, plain)


def test_an_interrupted_training_goes_on_to_the_same_result(tmp_path):
    train, _ = contaminated()
    test, _ = contaminated(20, 10, seed=1, first=100)
    choose = {"validation": test, "criterion": lambda scores: image_auroc(scores, test)}
    whole = FunAD(**QUICK).fit(train, **choose)
    FunAD(**{**QUICK, "epochs": 2}, checkpoint=tmp_path / "c").fit(train, **choose)
    resumed = FunAD(**QUICK, checkpoint=tmp_path / "c").fit(train, **choose)
    assert resumed.score(test).patch.tobytes() == whole.score(test).patch.tobytes()
    assert resumed.history == whole.history or str(resumed.history) == str(whole.history)
    assert resumed.use("test").score(test).patch.tobytes() == whole.use("test").score(test).patch.tobytes()
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"detector.json", "tensors.safetensors"}
    done = FunAD(**QUICK, checkpoint=tmp_path / "c").fit(train)
    assert len(done.history) == 6


def test_a_checkpoint_of_something_else_is_an_error(tmp_path):
    train, _ = contaminated()
    FunAD(**QUICK, checkpoint=tmp_path / "c").fit(train)
    for changed in ({"seed": 1}, {"smoothness": 1.0}, {"epochs": 3}):
        with pytest.raises(ValueError, match="checkpoint of other data or options"):
            FunAD(**{**QUICK, **changed}, checkpoint=tmp_path / "c").fit(train)
    other, _ = contaminated(seed=5)
    with pytest.raises(ValueError, match="checkpoint of other data or options"):
        FunAD(**QUICK, checkpoint=tmp_path / "c").fit(other)


def test_the_best_epoch_is_chosen_only_when_asked_for():
    train, _ = contaminated()
    values = iter([0.5, 0.9, 0.7, 0.9, 0.1, 0.2])
    detector = FunAD(**QUICK, epoch="test").fit(train, validation=train, criterion=lambda scores: next(values))
    assert [row["criterion"] for row in detector.history] == [0.5, 0.9, 0.7, 0.9, 0.1, 0.2]
    best = FunAD(**{**QUICK, "epochs": 2}).fit(train).score(train).patch
    assert np.array_equal(detector.score(train).patch, best)
    last = FunAD(**QUICK).fit(train).score(train).patch
    assert np.array_equal(detector.use("last").score(train).patch, last)


def test_synthetic_anomalies_are_learned_from_and_stay_out_of_the_memory():
    train, _ = contaminated(bad=0)
    extra, masks = contaminated(10, 10, seed=3, first=200)
    test, _ = contaminated(20, 10, seed=1, first=100)
    with_labels = FunAD(**{**QUICK, "epochs": 20}).fit(train, synthetic=(extra, masks))
    assert image_auroc(with_labels.score(test), test) > 0.95
    masks[:, 0] = True  # patches that no distance would call anomalous
    with_labels = FunAD(**{**QUICK, "epochs": 20}).fit(train, synthetic=(extra, masks)).score(extra)
    without = FunAD(**{**QUICK, "epochs": 20}, synthetic_labels=False).fit(train, synthetic=(extra, masks)).score(extra)
    assert with_labels.patch[:, 0].mean() > without.patch[:, 0].mean()


def test_a_saved_detector_gives_the_same_scores(tmp_path):
    train, _ = contaminated()
    for width in (None, 6):
        detector = FunAD(**QUICK, width=width).fit(train)
        detector.save(tmp_path / f"d{width}")
        loaded = FunAD.load(tmp_path / f"d{width}")
        assert loaded.score(train).patch.tobytes() == detector.score(train).patch.tobytes()
        assert loaded.history == detector.history


def test_defaults_are_the_supplements():
    options = FunAD().options
    assert (options["smoothness"], options["learning_rate"], options["batch_size"]) == (2.5, 2e-5, 32)
    assert (options["epochs"], options["epoch"], options["hidden"]) == (1500, "last", [1024, 128])
    layers = Network(1536, options["hidden"], 0)
    assert [layer.out_features for layer in (layers.adaptor, *layers.layers)] == [1536, 1024, 128, 1]


def test_misuse_is_an_error(tmp_path):
    train, _ = contaminated()
    with pytest.raises(ValueError, match='choose "last" or "test"'):
        FunAD(epoch="best")
    with pytest.raises(ValueError, match="chooses by labels"):
        FunAD(**QUICK, epoch="test").fit(train)
    with pytest.raises(ValueError, match="no state for epoch 'test'"):
        FunAD(**QUICK).fit(train).use("test")
    with pytest.raises(RuntimeError, match="call fit"):
        FunAD().score(train)
    with pytest.raises(RuntimeError, match="nothing to save"):
        FunAD().save(tmp_path / "d")
    with pytest.raises(ValueError, match="width=99"):
        FunAD(**QUICK, width=99).fit(train)
    with pytest.raises(ValueError, match="no training image"):
        FunAD(**QUICK).fit(train.subset(np.arange(0)))
