"""Blocked distances against brute force in double precision: near-ties, exact zeros, input that must fail."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.kernels import distances
from hclib.kernels.distances import nearest, pair_distances, patch_to_image, resolve_device, row_minimum


def draw(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def brute(queries, bank):
    return (queries[:, None].double() - bank[None].double()).square().sum(2).sqrt()


def brute_images(queries, references):
    return torch.stack([brute(queries.flatten(0, 1), image).amin(1) for image in references], 1).view(
        len(queries), -1, len(references)
    )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 40),
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([0.0, 50.0]),
    st.integers(0, 10**6),
)
def test_nearest_is_brute_force(count, size, channels, k, offset, seed):
    k = min(k, size)
    queries, bank = (
        draw(count, channels, seed=seed, offset=offset),
        draw(size, channels, seed=seed + 1, offset=offset),
    )
    values, indices = nearest(queries, bank, k)
    expected = brute(queries, bank).topk(k, dim=1, largest=False)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, expected.values.float(), rtol=1e-5, atol=1e-6)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 3, 64, 500])
def test_blocks_and_devices_give_the_same(k, device, monkeypatch):
    queries, bank = draw(130, 24), draw(500, 24, seed=1)
    expected = brute(queries, bank).topk(k, dim=1, largest=False)
    monkeypatch.setattr(distances, "_block_shape", lambda device, size: (48, 128))
    monkeypatch.setattr(distances, "PAIR_VALUES", 1000)
    values, indices = nearest(queries.to(device), bank.to(device), k)
    assert values.device.type == device.type
    assert torch.equal(indices.cpu(), expected.indices)
    torch.testing.assert_close(values.cpu(), expected.values.float(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 200), st.integers(1, 30), st.floats(-1e4, 1e4), st.integers(0, 10**6))
def test_points_of_the_bank_are_at_exactly_zero(size, channels, offset, seed):
    bank = draw(size, channels, seed=seed, offset=offset)
    values, indices = nearest(bank, bank)
    assert (values == 0).all()
    assert torch.equal(bank[indices[:, 0]], bank)


def test_near_ties_beyond_float32_products_are_settled():
    bank = draw(6, 128, offset=30.0)
    queries = bank + 1e-3 * draw(6, 128, seed=1)
    decoys = queries + 1.5e-3 * draw(6, 128, seed=2)  # a little farther, hidden in the rounding of a product
    both = torch.cat([decoys, bank])
    values, indices = nearest(queries, both, 2)
    expected = brute(queries, both).topk(2, dim=1, largest=False)
    assert torch.equal(indices, expected.indices) and indices[:, 0].tolist() == list(range(6, 12))
    torch.testing.assert_close(values, expected.values.float(), rtol=1e-5, atol=1e-7)


def test_copies_come_in_the_order_of_their_index():
    bank = draw(5, 8).repeat(3, 1)
    assert nearest(bank[:5], bank, 3)[1].tolist() == [[i, i + 5, i + 10] for i in range(5)]


def test_precision_switches_of_the_caller_change_nothing():
    queries, bank = draw(40, 64), draw(200, 64, seed=1)
    values, indices = nearest(queries, bank, 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = nearest(queries, bank, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(again[0], values) and torch.equal(again[1], indices)


def test_half_double_and_numpy_are_compared_in_float32():
    queries, bank = draw(20, 16), draw(100, 16, seed=1)
    for kind in (torch.float16, torch.float64):
        values, indices = nearest(queries.to(kind), bank.to(kind))
        expected = brute(queries.to(kind).float(), bank.to(kind).float()).min(1)
        assert torch.equal(indices[:, 0], expected.indices)
    assert torch.equal(nearest(queries.numpy(), bank.numpy())[1], nearest(queries, bank)[1])


def test_gradients_are_not_tracked():
    queries = draw(4, 3).requires_grad_()
    assert not nearest(queries, draw(5, 3))[0].requires_grad


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from([0.0, 20.0]),
)
def test_patch_to_image_is_brute_force(count, patches, images, others, channels, seed, offset):
    queries = draw(count, patches, channels, seed=seed, offset=offset)
    references = draw(images, others, channels, seed=seed + 1, offset=offset)
    found = patch_to_image(queries, references)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, brute_images(queries, references).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [(60, 40), (20, 130), (1000, 1000)])
def test_patch_to_image_meets_itself(device, block, monkeypatch):
    monkeypatch.setattr(distances, "_image_block", lambda device: block)
    images = draw(9, 17, 24, offset=5.0)
    images[4, 3] = images[1, 2]  # a patch that two images share
    found = patch_to_image(images.to(device), images.to(device)).cpu()
    queries = images.to(device)
    same = patch_to_image(queries, queries).cpu()
    expected = brute_images(images, images).float()
    for result in (found, same):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert (result[range(9), :, range(9)] == 0).all()
        assert result[4, 3, 1] == 0 and result[1, 2, 4] == 0


def test_patch_to_image_writes_into_what_it_is_given(tmp_path):
    images = draw(4, 6, 8).half()
    target = np.lib.format.open_memmap(tmp_path / "d.npy", mode="w+", dtype=np.float32, shape=(4, 6, 4))
    result = patch_to_image(images, images, out=torch.from_numpy(target))
    assert result.data_ptr() == torch.from_numpy(target).data_ptr()
    torch.testing.assert_close(torch.from_numpy(target.copy()), brute_images(images.float(), images.float()).float())
    with pytest.raises(ValueError, match="out"):
        patch_to_image(images, images, out=torch.empty(4, 6, 5))


def test_pair_distances_and_row_minimum():
    queries, bank = draw(30, 7), draw(50, 7, seed=1)
    indices = torch.randint(50, (30, 4))
    expected = brute(queries, bank).square().gather(1, indices)
    torch.testing.assert_close(pair_distances(queries, bank, indices), expected.float())
    matrix = draw(13, 192)
    values, columns = row_minimum(matrix)
    assert torch.equal(values, matrix.min(1).values) and torch.equal(columns, matrix.argmin(1))
    with pytest.raises(ValueError, match="multiple"):
        row_minimum(matrix[:, :100])


def test_a_changed_bank_changes_the_answer():
    queries, bank = draw(10, 5), draw(50, 5, seed=1)
    values, indices = nearest(queries, bank)
    bank[indices[3, 0]] += 10
    assert nearest(queries, bank)[0][3, 0] > values[3, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, b: nearest(q[0], b), "queries: shape"),
        (lambda q, b: nearest(q, b[:, :4]), "channels"),
        (lambda q, b: nearest(q, b[:0]), "no vectors|k ="),
        (lambda q, b: nearest(q[:, :0], b[:, :0]), "channel"),
        (lambda q, b: nearest(q.long(), b), "dtype"),
        (lambda q, b: nearest(q, b, 0), "k = 0"),
        (lambda q, b: nearest(q, b, 9), "k = 9"),
        (lambda q, b: nearest(q.index_fill(0, torch.tensor([2]), torch.nan), b), "queries: vector 2"),
        (lambda q, b: nearest(q, b.index_fill(0, torch.tensor([7]), torch.inf)), "bank: vector 7"),
        (lambda q, b: nearest(q, b.index_fill(0, torch.tensor([1]), 1e30)), "bank: vector 1"),
        (lambda q, b: patch_to_image(q, b), "images, patches, channels"),
        (lambda q, b: patch_to_image(q[None], b[None, :0]), "no vectors"),
        (lambda q, b: patch_to_image(q[None], b[None, :, :3]), "channels"),
        (lambda q, b: patch_to_image(q[None], b[None] * torch.nan), "references: patch 0 of image 0"),
        (lambda q, b: nearest(q.to("meta"), b), "meta"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(4, 6), draw(8, 6, seed=1))


def test_resolve_device():
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device().type == resolve_device("auto").type == best
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="gpu"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="usable CUDA"):
        resolve_device("cuda:99")
