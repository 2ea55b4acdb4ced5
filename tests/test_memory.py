"""The memory bank against brute force in double precision, its file, FAISS beside torch in one process."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hclib.kernels.memory import MemoryBank


def draw(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def brute(queries, points, k):
    squared = (queries[:, None].double() - points[None].double()).square().sum(2)
    return squared.topk(k, dim=1, largest=False)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("k", [1, 4])
def test_search_is_brute_force(engine, k):
    points, queries = draw(700, 24), draw(90, 24, seed=1)
    values, indices = MemoryBank(points, "cpu", engine=engine).search(queries, k)
    expected = brute(queries, points, k)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, expected.values.float(), rtol=1e-5, atol=1e-6)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64


def test_search_on_every_device(device):
    points, queries = draw(700, 24), draw(90, 24, seed=1)
    values, indices = MemoryBank(points, device).search(queries, 3)
    expected = brute(queries, points, 3)
    assert values.device.type == indices.device.type == device.type
    assert torch.equal(indices.cpu(), expected.indices)
    torch.testing.assert_close(values.cpu(), expected.values.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_stored_vectors_are_at_exactly_zero_even_far_from_the_origin(engine):
    points = draw(400, 32, offset=100.0)
    values, indices = MemoryBank(points, "cpu", engine=engine).search(points)
    assert (values == 0).all()
    assert torch.equal(indices[:, 0], torch.arange(400))


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_result_does_not_depend_on_chunks(engine, monkeypatch):
    bank = MemoryBank(draw(300, 8), "cpu", engine=engine)
    queries = draw(100, 8, seed=1)
    whole = bank.search(queries, 2)
    monkeypatch.setattr("hclib.kernels.memory.CHUNK", 33)
    for a, b in zip(whole, bank.search(queries, 2), strict=True):
        assert torch.equal(a, b)


def test_file_gives_the_same_bank_bit_for_bit(tmp_path):
    bank = MemoryBank(draw(50, 7), "cpu")
    bank.save(tmp_path / "bank.safetensors")
    back = MemoryBank.load(tmp_path / "bank.safetensors", "cpu")
    assert torch.equal(back.points.view(torch.int32), bank.points.view(torch.int32))
    queries = draw(20, 7, seed=1)
    for a, b in zip(bank.search(queries, 3), back.search(queries, 3), strict=True):
        assert torch.equal(a, b)


def test_a_changed_point_changes_the_distance():
    points, queries = draw(50, 7), draw(20, 7, seed=1)
    values, indices = MemoryBank(points, "cpu").search(queries)
    points[indices[0, 0]] += 1.0
    assert MemoryBank(points, "cpu").search(queries)[0][0, 0] != values[0, 0]


def test_numpy_half_precision_and_no_queries():
    points = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float16)
    bank = MemoryBank(points, "cpu")
    assert len(bank) == 9 and bank.points.dtype == torch.float32
    assert bank.search(torch.from_numpy(points))[1].flatten().tolist() == list(range(9))
    assert bank.search(torch.empty(0, 4), 2)[0].shape == (0, 2)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_wrong_input_is_refused(engine, tmp_path):
    points = draw(5, 3)
    bad = points.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="row 3"):
        MemoryBank(bad, "cpu", engine=engine)
    for shape in ((0, 3), (5, 0), (5,)):
        with pytest.raises(ValueError, match="shape"):
            MemoryBank(torch.empty(shape), "cpu", engine=engine)
    bank = MemoryBank(points, "cpu", engine=engine)
    with pytest.raises(ValueError, match="3-d|3\\)"):
        bank.search(draw(2, 4))
    for k in (0, 6):
        with pytest.raises(ValueError, match="k ="):
            bank.search(points, k)
    with pytest.raises(ValueError, match="3"):
        bank.search(bad)
    with pytest.raises(ValueError, match="engine"):
        MemoryBank(points, "cpu", engine="annoy")
    save_file({"patch": points}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="patch"):
        MemoryBank.load(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="safetensors"):
        MemoryBank.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        MemoryBank.load(tmp_path / "absent.safetensors")


def test_faiss_and_torch_take_turns_in_one_process():
    bank, queries = MemoryBank(draw(2000, 64), "cpu", engine="faiss"), draw(500, 64, seed=1)
    other = MemoryBank(bank.points, "cpu", engine="torch")
    first = bank.search(queries, 2)
    for _ in range(5):
        for engine in (bank, other):
            values, indices = engine.search(queries, 2)
            assert torch.equal(indices, first[1])
            torch.testing.assert_close(values, first[0])
