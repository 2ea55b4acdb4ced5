"""Students: attention, gradient discount, losses, the codebook, the training loop, detectors and their checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from test_detectors import make_features

from hclib.kernels.features import Features
from hclib.methods import StudentDetector
from hclib.methods.quantised_student import Codebook
from hclib.methods.student_detector import STUDENTS, Targets, at_tokens, draw_tokens, score_patches
from hclib.methods.students import (
    adaptive_factors,
    drop,
    gather_loss,
    hard_factors,
    linear_attention,
    loose_loss,
    point_distances,
    scale_gradient,
    score_map,
)
from hclib.methods.training import Recipe, StableAdamW, train, warm_cosine

CALM = {"dinomaly": {"dropout": 0.0}, "inpformer": {}, "hvq": {"codes": 64}}  # small, and nothing dropped
TINY = {"depth": 2, "width": 8, "steps": 20, "batch_size": 4, "learning_rate": 3e-3}


def layered(count=12, *, layers=4, grid=4, channels=12, seed=0, first=0):
    """Images of one product: smooth patches of low rank in several layers of one grid, as float16."""
    base = make_features((count,), grid=grid, channels=channels, seed=seed, first=first)
    basis = np.random.default_rng(5).normal(size=(layers, 3, channels))
    mixture = np.random.default_rng(seed + 1).normal(size=(count, grid, grid, 3)) * 0.3 + [2, 1, -1]
    maps = {f"block{i + 3}": (mixture @ basis[i]).astype(np.float16) for i in range(layers)}
    return Features(maps, base.tokens, base.index, base.encoder | {"layers": list(maps)})


def batch(images=4, groups=2, patches=9, channels=12, seed=0):
    return torch.randn(images, groups, patches, channels, generator=torch.Generator().manual_seed(seed))


def test_linear_attention_equals_its_quadratic_form():
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, n, 5, generator=generator).double() for n in (7, 11, 11))
    weights = (torch.nn.functional.elu(queries) + 1) @ (torch.nn.functional.elu(keys) + 1).transpose(2, 3)
    expected = weights / weights.sum(3, keepdim=True) @ values
    torch.testing.assert_close(linear_attention(queries, keys, values), expected)


def test_gradients_are_scaled_and_values_are_not():
    values = torch.arange(6.0).view(2, 3).requires_grad_()
    scaled = scale_gradient(values, torch.tensor([[0.1], [1.0]]))
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad.tolist() == [[pytest.approx(0.1)] * 3, [1.0] * 3]


@pytest.mark.parametrize(("share", "kept"), [(0.0, 32), (0.9, 3), (0.5, 16), (0.99, 1)])
def test_the_discount_spares_exactly_the_positions_rebuilt_worst(share, kept):
    distances = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    factors = hard_factors(distances, share)
    worst = distances.flatten().argsort(descending=True)[:kept]
    expected = torch.full((32,), 0.1)
    expected[worst] = 1.0
    assert torch.equal(factors.flatten(), expected)


def test_discounted_positions_get_a_tenth_of_their_gradient_in_the_loss():
    targets, outputs = batch(), batch(seed=1).requires_grad_()
    plain = torch.autograd.grad(loose_loss(outputs, targets), outputs)[0]
    factors = torch.stack([hard_factors(d, 0.75) for d in point_distances(outputs, targets).unbind(1)], 1)
    discounted = torch.autograd.grad(loose_loss(outputs, targets, factors), outputs)[0]
    ratio = (discounted / plain).amax(3)
    assert torch.allclose(ratio, factors, atol=1e-4)
    assert [int((ratio[:, g] > 0.5).sum()) for g in range(2)] == [9, 9]  # a quarter of 36 positions in each group


def test_losses_by_hand():
    targets = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # one image, one group, two patches
    outputs = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert score_map(outputs, targets).tolist() == [[0.0, 1.0]]
    assert float(loose_loss(outputs, targets)) == pytest.approx(0.5)  # (1,0,1,0) against (1,0,0,1)
    assert adaptive_factors(torch.tensor([[1.0, 3.0]])).tolist() == [[0.125, 3.375]]
    tokens, prototypes = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]), torch.tensor([[[1.0, 0.0]]])
    assert float(gather_loss(tokens, prototypes)) == pytest.approx(0.5)


def test_dropout_draws_from_its_generator():
    values = torch.ones(2000)
    dropped = [drop(values, 0.2, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*dropped) and drop(values, 0.2, None) is values
    assert set(dropped[0].unique().tolist()) == {0.0, 1.25} and abs((dropped[0] == 0).float().mean() - 0.2) < 0.03


def test_a_codebook_quantises_passes_gradients_and_follows_the_inputs():
    book, generator = Codebook(4, 3), torch.Generator().manual_seed(0)
    values = torch.randn(2, 10, 3, generator=generator).requires_grad_()
    codes, loss = book(values, generator)
    points, found = values.detach().flatten(0, 1), codes.detach().flatten(0, 1)
    used = torch.stack([c for c in found.round(decimals=4).unique(dim=0)])
    assert len(used) <= 4 and all((torch.cdist(points, c[None]) < 1e-3).any() for c in used)  # tokens of the batch
    assert torch.allclose((points - found).norm(dim=1), torch.cdist(points, used).amin(1), atol=1e-3)
    codes.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert float(loss) == pytest.approx(float((codes - values).detach().square().mean()), rel=1e-4)
    far = torch.full((2, 10, 3), 5.0)
    for _ in range(600):
        book(far, generator)
    assert (book.codes - 5).abs().sum(1).min() < 0.1
    before = book.codes.clone()
    book.eval()(far * 2)
    assert torch.equal(book.codes, before)


def test_warm_up_then_cosine():
    rates = [warm_cosine(step, 1000, 2.0, 0.2, 100) for step in range(1000)]
    assert rates[0] == 0 and rates[99] == 2.0 and rates[100] == 2.0
    assert rates[550] == pytest.approx(1.1) and rates[-1] == pytest.approx(0.2, abs=1e-4)
    assert np.all(np.diff(rates[:100]) > 0) and np.all(np.diff(rates[100:]) < 0)


def test_stable_adamw_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.5)
    state, expected = {"m": np.zeros(2), "v": np.zeros(2), "top": np.zeros(2)}, np.array([1.0, -2.0])
    for step, gradient in enumerate(([1.0, 2.0], [30.0, -4.0], [0.1, 0.0]), 1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        g = np.array(gradient)
        state["m"], state["v"] = 0.9 * state["m"] + 0.1 * g, 0.999 * state["v"] + 0.001 * g * g
        state["top"] = np.maximum(state["top"], state["v"])
        denominator = np.sqrt(state["top"]) / math.sqrt(1 - 0.999**step) + 1e-10
        rate = 0.1 / (1 - 0.9**step) / max(1, np.sqrt(np.mean((g / denominator) ** 2)))
        expected = expected * (1 - 0.1 * 0.5) - rate * state["m"] / denominator
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(STUDENTS))
@pytest.mark.parametrize("width", [None, 8])
def test_every_student_overfits_one_batch(name, width):
    student = STUDENTS[name](12, [3, 1], width=width, depth=2, seed=0, **CALM[name])
    targets, generator = batch(patches=6), torch.Generator().manual_seed(0)
    start = float(student(targets)[0].detach().abs().sum())
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    first = None
    for _ in range(150):
        outputs, auxiliary = student(targets, generator)
        loss = student.loss(outputs, targets, 0.5) + auxiliary
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or float(point_distances(outputs, targets).mean())
    last = float(point_distances(student.eval()(targets)[0], targets).mean())
    assert start >= 0 and first > 0.8 and last < (0.85 if width else 0.35), (first, last)


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = STUDENTS["inpformer"](12, [1, 1], depth=2, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = STUDENTS["inpformer"](12, [1, 1], depth=2, seed=3).state_dict()
    c = STUDENTS["inpformer"](12, [1, 1], depth=2, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_targets_are_group_means_held_or_read():
    features = layered(layers=3)
    device = torch.device("cpu")
    held, read = Targets(features, None, 2, device), Targets(features, None, 2, device, keep=False)
    assert held.parts == [["block3", "block4"], ["block5"]] and held.shares == [2, 1] and len(held) == 12
    rows = torch.tensor([7, 2])
    assert torch.equal(held[rows], read[rows])
    maps = [np.asarray(features.maps[f"block{i}"], np.float64)[[7, 2]].reshape(2, 16, 12) for i in (3, 4, 5)]
    expected = torch.from_numpy(np.stack([(maps[0] + maps[1]) / 2, maps[2]], 1)).float()
    torch.testing.assert_close(held[rows], expected, atol=2e-3, rtol=2e-3)
    student = STUDENTS["dinomaly"](12, held.shares, depth=2)
    seen = []
    student.decode = lambda inputs, generator: (seen.append(inputs) or [inputs, inputs], inputs.sum())
    student(held[rows])
    torch.testing.assert_close(seen[0], torch.from_numpy(sum(maps) / 3).float(), atol=3e-3, rtol=3e-3)
    with pytest.raises(ValueError, match="layers"):
        Targets(features, ["block9"], 1, device)
    with pytest.raises(ValueError, match="groups=4"):
        Targets(features, None, 4, device)


def test_the_first_decoder_blocks_rebuild_the_deepest_layers():
    student = STUDENTS["dinomaly"](4, [2, 2], depth=4)
    blocks = [torch.full((1, 2, 4), float(i)) for i in range(4)]
    student.decode = lambda inputs, generator: (blocks, inputs.sum())
    outputs, _ = student(torch.zeros(1, 2, 2, 4))
    assert outputs[0, :, 0, 0].tolist() == [2.5, 0.5]


def test_drawn_tokens_are_distinct_ascending_and_gathered():
    generator = torch.Generator().manual_seed(0)
    which = draw_tokens(3, 9, 4, generator, torch.device("cpu"))
    assert which.shape == (3, 4) and (which.diff(dim=1) > 0).all()
    targets = batch(images=3)
    picked = at_tokens(targets, which)
    assert torch.equal(picked[2, 1], targets[2, 1, which[2]])
    assert draw_tokens(3, 9, 9, generator, torch.device("cpu")) is None and at_tokens(targets, None) is targets


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_a_trained_student_scores_what_it_has_not_seen_higher_and_is_saved(name, tmp_path):
    normal, test = layered(24), layered(8, seed=9)
    maps = {layer: np.array(values) for layer, values in test.maps.items()}
    for values in maps.values():
        values[:4, 1:3, 1:3] += np.random.default_rng(3).normal(size=12).astype(np.float16) * 4
    test = Features(maps, test.tokens, test.index, test.encoder)
    options = TINY | {"student": name, "steps": 100, "depth": 2, "learning_rate": 3e-3, "clip": 1.0}
    detector = StudentDetector(**options, network=CALM[name]).fit(normal)
    scores = detector.score(test)
    assert scores.patch.shape == (8, 4, 4) and scores.image[:4].min() > scores.image[4:].max()
    assert detector.history[-1]["loss"] < 0.5 * detector.history[0]["loss"]
    detector.save(tmp_path / "saved")
    loaded = StudentDetector.load(tmp_path / "saved")
    assert loaded.score(test).patch.tobytes() == scores.patch.tobytes() and loaded.history == detector.history


def test_fewer_tokens_in_training_still_score_all_patches():
    detector = StudentDetector(**TINY, tokens=5).fit(layered())
    assert detector.score(layered(3, seed=2)).patch.shape == (3, 4, 4)


@pytest.mark.parametrize("optimizer", ["stable_adamw", "adamw"])
@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_killed_and_resumed_is_the_same_bit_for_bit(name, optimizer, tmp_path, monkeypatch):
    features = layered()
    options = TINY | {"student": name, "optimizer": optimizer, "tokens": 11, "every": 4}
    options["network"] = {"codes": 64} if name == "hvq" else None
    through = StudentDetector(**options).fit(features)
    steps = iter(range(14))
    loss = STUDENTS[name].loss

    def mortal(self, *args):
        next(steps)  # runs out in step 14, in the middle of a pass and two steps after a checkpoint
        return loss(self, *args)

    monkeypatch.setattr(STUDENTS[name], "loss", mortal)
    with pytest.raises(StopIteration):
        StudentDetector(**options, checkpoint=tmp_path).fit(features)
    monkeypatch.setattr(STUDENTS[name], "loss", loss)
    resumed = StudentDetector(**options, checkpoint=tmp_path).fit(features)
    state, again = through.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state) and resumed.history == through.history
    assert len(through.history) == 7 and through.history[-1]["images"] == 12


def test_a_broken_newest_checkpoint_place_leaves_the_other(tmp_path):
    features, options = layered(), TINY | {"every": 4}
    through = StudentDetector(**options, checkpoint=tmp_path).fit(features)
    (folder,) = tmp_path.iterdir()
    steps = {p.name: json.loads((p / "detector.json").read_text())["options"]["step"] for p in folder.iterdir()}
    assert sorted(steps.values()) == [16, 20]
    newest = folder / max(steps, key=steps.get)
    (newest / "detector.json").unlink()  # as if killed between removing the old and renaming the new
    (newest / "tensors.safetensors").unlink()
    again = StudentDetector(**options, checkpoint=tmp_path).fit(features)
    weights = [d.network.state_dict() for d in (through, again)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    network = torch.nn.Linear(2, 1)

    def loss(rows, step, generator):
        return network(torch.ones(len(rows), 2)).square().mean()

    def rows(step):
        return torch.arange(4), {}

    train(network, loss, rows, Recipe(steps=3, batch_size=2), checkpoint=tmp_path, fingerprint="one")
    with pytest.raises(ValueError, match="other data or options"):
        train(network, loss, rows, Recipe(steps=3, batch_size=2), checkpoint=tmp_path, fingerprint="two")
    with pytest.raises(ValueError, match="no image"):
        train(network, loss, lambda step: (torch.arange(0), {}), Recipe(steps=3))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(network, lambda *a: loss(*a) * math.nan, rows, Recipe(steps=3))


def test_scores_do_not_depend_on_how_images_are_split_into_blocks():
    data = Targets(layered(40), None, 2, torch.device("cpu"))
    student = STUDENTS["dinomaly"](12, data.shares, depth=2, width=8)
    scores = score_patches(student, data)
    few = score_patches(student, Targets(layered(40).subset(np.arange(33, 40)), None, 2, torch.device("cpu")))
    torch.testing.assert_close(scores[33:], few, rtol=1e-5, atol=1e-6)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="student='vae'"):
        StudentDetector(student="vae")
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        StudentDetector(optimizer="sgd")
    with pytest.raises(ValueError, match="steps=0"):
        StudentDetector(steps=0)
    with pytest.raises(ValueError, match="hard_mining=1"):
        StudentDetector(hard_mining=1)
    with pytest.raises(ValueError, match="depth=1"):
        StudentDetector(**TINY | {"depth": 1}).fit(layered())
    with pytest.raises(ValueError, match="heads"):
        STUDENTS["dinomaly"](12, [1, 1], width=131)
    with pytest.raises(RuntimeError, match="no network"):
        StudentDetector().score(layered())
    with pytest.raises(ValueError, match="no training image"):
        StudentDetector().fit(layered().subset(np.zeros(12, bool)))
