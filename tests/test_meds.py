"""MeDS: bootstrapped memories against drawn ones, their limit, selection by hand, resuming, ranking for review."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detectors import make_features
from test_students import layered

from hclib.kernels.distances import nearest, patch_to_image
from hclib.kernels.features import Features
from hclib.methods import BootstrappedMemory, MeDS, StudentDetector, meds
from hclib.methods.meds import PROGRAM, bootstrap_limit, bootstrap_scores, robust_maximum, selection_threshold
from hclib.methods.meds_memory import draw_images, draw_size, limit_weights, memory_patches, memory_scores
from hclib.methods.students import DinomalyStudent

QUICK = {"depth": 2, "width": 8, "batch_size": 4, "learning_rate": 3e-3, "clip": 1.0, "network": {"dropout": 0.0}}


def contaminated(count=24, bad=4, seed=0, strength=6.0):
    """Two products of `count` images each; the first `bad` images of both hold a foreign 2 x 2 block of their own."""
    parts, rng = [layered(count, seed=seed), layered(count, seed=seed + 50, first=count)], np.random.default_rng(seed)
    maps = {k: np.concatenate([part.maps[k] * (i + 1) for i, part in enumerate(parts)]) for k in parts[0].maps}
    index = make_features((count, count)).index
    for row in [*range(bad), *range(count, count + bad)]:
        foreign = rng.normal(size=12) * strength
        for values in maps.values():
            values[row, 1:3, 1:3] += foreign.astype(np.float16)
        index.loc[row, ["label", "defect"]] = [1, "foreign"]
    tokens = np.concatenate([part.tokens + 9 * i for i, part in enumerate(parts)])
    return Features(maps, tokens, index, parts[0].encoder), list(index["category"])


def tensor(images=6, patches=5, references=8, seed=0):
    return torch.rand(images, patches, references, generator=torch.Generator().manual_seed(seed))


def drawn_and_searched(patches, ratio, ensembles, seed, replacement):
    """The definition: build every memory from the patches of its images, search it, average."""
    total = torch.zeros(len(patches) * patches.shape[1], dtype=torch.float64)
    for images in draw_images(len(patches), ratio, ensembles, seed, replacement=replacement):
        total += nearest(patches.flatten(0, 1), patches[images].flatten(0, 1))[0][:, 0]
    return (total / ensembles).float().view(patches.shape[:2])


@pytest.mark.parametrize("replacement", [True, False])
def test_scores_equal_drawing_every_memory_and_searching_it(replacement):
    patches = torch.randn(20, 9, 6, generator=torch.Generator().manual_seed(2))
    scores = bootstrap_scores(patch_to_image(patches, patches), 0.3, 30, 5, replacement=replacement)
    assert (scores - drawn_and_searched(patches, 0.3, 30, 5, replacement)).abs().max() < 1e-5


@pytest.mark.slow
def test_scores_are_five_times_faster_than_drawing_and_searching():
    patches = torch.randn(60, 100, 128, generator=torch.Generator().manual_seed(0))
    seconds = []
    for compute in (
        lambda: bootstrap_scores(patch_to_image(patches, patches)),
        lambda: drawn_and_searched(patches, 0.1, 100, 0, True),
    ):
        start = time.process_time()
        seconds.append((compute(), time.process_time() - start))
    (fast, quick), (plain, slow) = seconds
    assert (fast - plain).abs().max() < 1e-5
    assert slow > 5 * quick, f"{quick:.2f} s against {slow:.2f} s"


def test_draws_are_nested_and_of_the_right_size():
    assert [draw_size(70, 0.1), draw_size(71, 0.1), draw_size(5, 0.1), draw_size(9, 1)] == [7, 8, 1, 9]
    for replacement in (True, False):
        few, many = (draw_images(40, r, b, 3, replacement=replacement) for r, b in ((0.1, 5), (0.3, 8)))
        assert few.shape == (5, 4) and torch.equal(few, many[:5, :4])
    assert all(len(row.unique()) == 12 for row in many)
    assert not torch.equal(draw_images(40, seed=1), draw_images(40, seed=2))
    for wrong in ({"ratio": 0}, {"ratio": 1.5}, {"ensembles": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            draw_images(10, **wrong)


@pytest.mark.parametrize("replacement", [True, False])
def test_scores_tend_to_the_limit_as_memories_are_added(replacement):
    distances = tensor(4, 6, 12)
    limit = bootstrap_limit(distances, 0.25, replacement=replacement)
    errors = [
        (bootstrap_scores(distances, 0.25, b, 1, replacement=replacement) - limit).abs().mean().item()
        for b in (10, 100, 1000)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01
    assert 4 < errors[0] / errors[2] < 25  # about 10, as 1 / sqrt(B) has it


def test_weights_of_the_limit_by_enumeration():
    for images, ratio in ((5, 0.4), (4, 0.5)):
        size = draw_size(images, ratio)
        every = torch.cartesian_prod(*[torch.arange(images)] * size)
        expected = torch.bincount(every.amin(1), minlength=images) / len(every)
        torch.testing.assert_close(limit_weights(images, ratio).float(), expected)
        chosen = torch.combinations(torch.arange(images), size)
        expected = torch.bincount(chosen.amin(1), minlength=images) / len(chosen)
        torch.testing.assert_close(limit_weights(images, ratio, replacement=False).float(), expected)


@given(st.integers(1, 9), st.floats(0.05, 1), st.booleans(), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_limit_ignores_the_order_of_images_and_lies_between_the_extremes(references, ratio, replacement, seed):
    distances = tensor(3, 4, references, seed)
    order = torch.randperm(references, generator=torch.Generator().manual_seed(seed))
    limit = bootstrap_limit(distances, ratio, replacement=replacement)
    torch.testing.assert_close(bootstrap_limit(distances[..., order], ratio, replacement=replacement), limit)
    assert (limit >= distances.amin(2) - 1e-6).all() and (limit <= distances.mean(2) + 1e-6).all()
    assert limit_weights(references, ratio, replacement=replacement).sum() == pytest.approx(1)


@given(st.integers(1, 12), st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), st.booleans(), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_larger_memories_never_score_higher(references, ratios, replacement, seed):
    distances, (low, high) = tensor(2, 3, references, seed), sorted(ratios)
    for compute in (bootstrap_limit, lambda d, r, **k: bootstrap_scores(d, r, 7, seed, **k)):
        fewer, more = (compute(distances, r, replacement=replacement) for r in (low, high))
        assert (more <= fewer + 1e-6).all()


def test_every_image_drawn_once_is_the_plain_minimum():
    distances = tensor()
    for compute in (bootstrap_scores, bootstrap_limit):
        torch.testing.assert_close(compute(distances, 1.0, replacement=False), distances.amin(2))


def test_memory_maps_and_blocks_give_the_same(tmp_path, monkeypatch):
    distances = tensor(7, 5, 9)
    mapped = np.memmap(tmp_path / "d", np.float32, "w+", shape=(7, 5, 9))
    mapped[:] = distances.numpy()
    whole = [bootstrap_scores(distances), bootstrap_limit(distances)]
    monkeypatch.setattr("hclib.methods.meds_memory.HELD", 100)
    for compute, expected in zip((bootstrap_scores, bootstrap_limit), whole, strict=True):
        assert torch.equal(compute(mapped), expected) and torch.equal(compute(distances), expected)
        with pytest.raises(ValueError, match=r"\(N, P, Nr\)"):
            compute(distances[0])
    patches = torch.randn(6, 5, 4)
    kept = memory_scores(patches, patches, ensembles=9)
    monkeypatch.setattr("hclib.methods.meds_memory.ON_DISK", 1)
    assert torch.equal(memory_scores(patches, patches, ensembles=9), kept)


def test_memories_compare_directions_averaged_over_layers():
    features = layered(5)
    patches = memory_patches(features, np.arange(5), ["block3", "block6"])
    assert torch.allclose(patches.norm(dim=2), torch.ones(5, 16))
    layers = [np.asarray(features.maps[k], np.float64).reshape(5, 16, 12) for k in ("block3", "block6")]
    units = [layer / np.linalg.norm(layer, axis=2, keepdims=True) for layer in layers]
    cosine = np.mean([unit[0] @ unit[3].T for unit in units], axis=0)  # patches of image 0 with those of image 3
    scores = memory_scores(patches[:1], patches[3:4], ratio=1.0, ensembles=None)
    np.testing.assert_allclose(scores[0].numpy(), (1 - cosine).min(1), atol=1e-5)
    length = memory_scores(patches[:1], patches[3:4], ratio=1.0, ensembles=None, distance="l2")
    torch.testing.assert_close(length.square() / 2, scores, rtol=1e-4, atol=1e-5)


def test_threshold_and_robust_maximum_have_their_numbers():
    assert selection_threshold(torch.tensor([100.0, 1, 2, 3, 4]), 1) == 4.0  # median 3, deviations 97 2 1 0 1
    assert selection_threshold(np.array([1.0, 2, 3, 10]), 3) == 5.5  # median 2.5, MAD 1
    assert selection_threshold([7.0], 3) == 7.0
    with pytest.raises(ValueError, match="not finite"):
        selection_threshold([1.0, math.nan], 1)
    patch = torch.arange(784.0)[None]
    assert robust_maximum(patch).item() == 779.5  # 8 patches, 776 to 783
    assert robust_maximum(patch, rounding="floor").item() == 780.0  # 7 patches
    assert robust_maximum(patch[:, :50], rounding="floor").item() == 49.0  # at least one
    assert robust_maximum(patch[:, :700], 1.0).item() == 696.0  # exactly 7


def fitted(**options):
    train, labels = contaminated()
    return MeDS(**QUICK | {"steps": 60, "ensembles": 20} | options).fit(train, labels), train, labels


@pytest.fixture(scope="module")
def plain():
    return fitted()


def test_injected_images_come_first_in_review(plain):
    detector, train, _ = plain
    for stage in ("memory", "distilled", "final"):
        review = detector.rank_for_review(train.index, stage=stage)
        assert review["label"].head(8).sum() == 8, stage
        assert review["excess"].is_monotonic_decreasing and sorted(review["row"]) == list(range(48))
    assert not review["selected"].head(8).any() and review["selected"].mean() > 0.4
    one = review[review["group"] == 1]
    spread = selection_threshold(one["score"], 1) - one["score"].median()
    np.testing.assert_allclose(one["excess"], (one["score"] - one["score"].median()) / spread)
    assert detector.rank_for_review(train.index, by="score")["score"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="has 47 images"):
        detector.rank_for_review(train.index.iloc[1:])
    with pytest.raises(RuntimeError, match="fit"):
        MeDS().rank_for_review(train.index)


def test_selection_follows_the_algorithm(plain):
    detector, _, _ = plain
    rows = [row for row in detector.history if row["stage"] == "select"]
    assert rows[0]["images"] == 48 and rows[0]["recall"] == 1.0 and rows[0]["precision"] == pytest.approx(40 / 48)
    for row in rows:
        time = (row["step"] + 1) / 60
        assert row["alpha"] == pytest.approx(min(1, 2 * time)) and row["k"] == pytest.approx(time)
    assert all(24 <= row["images"] <= 40 for row in rows[1:])
    assert all(row["precision"] == 1.0 for row in rows[1:])
    steps = [row["step"] for row in rows]
    assert np.diff(steps).tolist() == [math.ceil(row["images"] / 4) for row in rows[:-1]]  # whole passes
    distill = [row for row in detector.history if row["stage"] == "distill"]
    assert all(row["images"] == 48 for row in distill) and distill[-1]["loss"] < distill[0]["loss"]


def test_thresholds_are_per_class_and_strict():
    detector = MeDS()
    detector.groups = np.array([0, 0, 0, 0, 1, 1, 1])
    scores = np.array([1.0, 2, 3, 4, 100, 200, 300])
    assert detector._select(scores, 0).tolist() == [True, True, False, False, True, False, False]
    assert detector._select(scores, 1).tolist() == [True, True, True, False, True, True, False]
    assert detector._select(np.ones(7), 0).all()  # nothing is below: what is at the threshold


def test_the_program_selects_half_before_the_first_pass():
    detector, _, _ = fitted(**PROGRAM)
    rows = [row for row in detector.history if row["stage"] == "select"]
    assert rows[0]["images"] == 24 and rows[0]["alpha"] == 0 and rows[0]["k"] == 0
    assert rows[1]["k"] == pytest.approx(3 * rows[1]["step"] / 60)


def test_several_passes_share_a_selection():
    detector, _, _ = fitted(passes=2, steps=40)
    rows = [row for row in detector.history if row["stage"] == "select"]
    steps = [row["step"] for row in rows]
    assert rows[0]["images"] == 48 and np.diff(steps)[0] == 24
    assert np.diff(steps).tolist() == [math.ceil(2 * row["images"] / 4) for row in rows[:-1]]


def test_distillation_imitates_the_memory():
    detector, data = MeDS(**QUICK), contaminated()[0]
    targets = detector._read(data)
    network = detector._make(targets.channels, targets.shares)
    memory, rows = torch.rand(48, 16), torch.tensor([3, 30])
    outputs, _ = network.train()(targets[rows])
    error = (1 - torch.nn.functional.cosine_similarity(outputs, targets[rows], dim=3)).mean(1) - memory[rows]
    generator = torch.Generator().manual_seed(0)
    loss = detector._distillation(network, targets, memory)(rows, 0, generator)
    assert float(loss.detach()) == pytest.approx(float(error.detach().square().sum(1).sqrt().mean()), rel=1e-5)
    detector.options["distill_loss"] = "mse"
    loss = detector._distillation(network, targets, memory)(rows, 0, generator)
    assert float(loss.detach()) == pytest.approx(10 * float(error.detach().square().mean()), rel=1e-5)
    detector.options["tokens"] = 5
    assert math.isfinite(detector._distillation(network, targets, memory)(rows, 0, generator).detach())


def test_killed_in_stage_three_and_resumed_is_the_same_bit_for_bit(plain, tmp_path, monkeypatch):
    through, train, labels = plain
    options = QUICK | {"steps": 60, "ensembles": 20, "every": 7, "checkpoint": tmp_path}
    steps, loss = iter(range(31)), DinomalyStudent.loss

    def mortal(self, *args):
        next(steps)  # only stage 3 calls it: dies in its step 31, between checkpoints and within a pass
        return loss(self, *args)

    monkeypatch.setattr(DinomalyStudent, "loss", mortal)
    with pytest.raises(StopIteration):
        MeDS(**options).fit(train, labels)
    monkeypatch.setattr(DinomalyStudent, "loss", loss)
    monkeypatch.setattr(meds, "memory_scores", None)  # stage 1 is read, not computed again
    resumed = MeDS(**options).fit(train, labels)
    weights = [d.network.state_dict() for d in (through, resumed)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert resumed.history == through.history
    assert all((resumed.selection_scores[k] == v).all() for k, v in through.selection_scores.items())
    assert resumed.score(train).patch.tobytes() == through.score(train).patch.tobytes()
    monkeypatch.setattr(StudentDetector, "_reconstruction", lambda *a: None)
    again = MeDS(**options).fit(train, labels)  # complete: only read
    assert again.history == through.history


MORTAL = """
import itertools, os, signal
from test_meds import QUICK, contaminated
from hclib.methods import MeDS
from hclib.methods.students import DinomalyStudent

steps, loss = itertools.count(), DinomalyStudent.loss

def mortal(self, *args):  # only stage 3 calls it
    if next(steps) == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, *args)

DinomalyStudent.loss = mortal
train, labels = contaminated()
MeDS(**QUICK, steps=60, ensembles=20, every=7, checkpoint="CHECKPOINT", device="cpu").fit(train, labels)
"""


@pytest.mark.slow
def test_a_process_killed_by_the_system_in_stage_three_leaves_what_its_successor_needs(tmp_path):
    code = MORTAL.replace("CHECKPOINT", tmp_path.as_posix())
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert ended.returncode == -signal.SIGKILL
    train, labels = contaminated()
    options = QUICK | {"steps": 60, "ensembles": 20, "device": "cpu"}
    resumed = MeDS(**options, every=7, checkpoint=tmp_path).fit(train, labels)
    through = MeDS(**options).fit(train, labels)
    weights = [d.network.state_dict() for d in (through, resumed)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert resumed.history == through.history
    assert resumed.score(train).image.tobytes() == through.score(train).image.tobytes()


def test_selections_share_the_first_two_stages(plain, tmp_path, monkeypatch):
    _, train, labels = plain
    options = QUICK | {"steps": 12, "ensembles": 5, "checkpoint": tmp_path}
    first = MeDS(**options).fit(train, labels)
    monkeypatch.setattr(meds, "memory_scores", None)
    monkeypatch.setattr(MeDS, "_distillation", lambda *a: None)
    second = MeDS(**options, k=3.0, rounding="floor").fit(train, labels)
    assert (second.selection_scores["memory"] >= first.selection_scores["memory"]).all()
    assert second.history[-1]["k"] > first.history[-1]["k"]
    monkeypatch.undo()
    other = MeDS(**options | {"ensembles": 6}).fit(train, labels)
    assert (other.selection_scores["memory"] != first.selection_scores["memory"]).any()
    assert sum(p.name.startswith("memory") for p in tmp_path.iterdir()) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"initialise": "random"},
        {"criterion": "memory"},
        {"selection": False},
        {"student": "inpformer", "network": None},
        {"student": "hvq", "network": {"codes": 16}},
        {"ensembles": None, "memory_distance": "l2", "replacement": False, "memory_layers": ["block4"], "tokens": 7},
    ],
)
def test_every_variant_runs_and_is_saved(options, tmp_path):
    detector, train, _ = fitted(**{"steps": 8} | options)
    scores = detector.score(train)
    assert scores.patch.shape == (48, 4, 4) and np.isfinite(scores.patch).all()
    stages = {row["stage"] for row in detector.history}
    assert stages == ({"distill"} if options.get("selection") is False else {"distill", "select"})
    detector.save(tmp_path / "saved")
    loaded = MeDS.load(tmp_path / "saved")
    assert loaded.score(train).patch.tobytes() == scores.patch.tobytes()
    assert loaded.rank_for_review(train.index).equals(detector.rank_for_review(train.index))


def test_groups_without_labels_are_one_or_clusters():
    train, labels = contaminated()
    assert (MeDS()._group(train, None) == 0).all()
    assert MeDS()._group(train, labels).tolist() == [0] * 24 + [1] * 24
    clusters = MeDS(grouping="finch")._group(train, None)
    assert len(np.unique(clusters)) >= 2 and set(clusters[:24]).isdisjoint(clusters[24:])
    with pytest.raises(ValueError, match="3 labels for 48"):
        MeDS()._group(train, ["a"] * 3)


def test_the_memory_alone_is_a_detector():
    train, labels = contaminated()
    detector = BootstrappedMemory(ensembles=30).fit(train, labels)
    test, _ = contaminated(count=6, bad=2, seed=4)
    scores = detector.score(test, list(test.index["category"]))
    label = test.index["label"].to_numpy() == 1
    for group in (0, 1):
        mine = scores.group == group
        assert scores.image[mine & label].min() > scores.image[mine & ~label].max()
    own = memory_patches(train, np.arange(24, 48), list(train.maps))
    queries = memory_patches(test, np.arange(6, 12), list(train.maps))
    expected = memory_scores(queries, own, ensembles=30).view(6, 4, 4).numpy()
    np.testing.assert_array_equal(scores.patch[6:], expected)
    with pytest.raises(ValueError, match="no training image has it"):
        detector.score(test)
    with pytest.raises(RuntimeError, match="fit"):
        BootstrappedMemory().score(test)


def test_errors_name_the_value():
    for name in ("memory_distance", "distill_loss", "rounding", "initialise", "criterion", "grouping"):
        with pytest.raises(ValueError, match=f"{name}='wrong'"):
            MeDS(**{name: "wrong"})
    with pytest.raises(ValueError, match="block99"):
        MeDS(**QUICK, memory_layers=["block99"]).fit(contaminated()[0])
    with pytest.raises(TypeError, match="stepz"):
        MeDS(stepz=3)
