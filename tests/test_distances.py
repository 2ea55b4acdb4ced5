"""The distance kernel against brute force in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.kernels.distances import nearest, patch_to_image, resolve_device


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 90), st.integers(1, 40), st.integers(0, 2**20))
def test_nearest_equals_brute_force(queries, bank, width, seed):
    generator = torch.Generator().manual_seed(seed)
    q, b = torch.randn(queries, width, generator=generator), torch.randn(bank, width, generator=generator)
    k = 1 + seed % min(bank, 5)
    values, indices = nearest(q, b, k)
    exact = torch.cdist(q.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")
    expected = exact.topk(k, largest=False).values
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(exact.gather(1, indices), expected, rtol=1e-5, atol=1e-6)
    assert values.shape == indices.shape == (queries, k) and values.dtype == torch.float32


def test_nearest_on_every_device_and_far_from_the_origin(device):
    bank = torch.randn(3000, 64) + 500
    queries = bank[::7] + 0.01 * torch.randn(429, 64)
    values, indices = nearest(queries.to(device), bank.to(device))
    exact = torch.cdist(queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert indices[:, 0].cpu().tolist() == exact.indices.tolist()
    torch.testing.assert_close(values[:, 0].double().cpu(), exact.values, rtol=1e-3, atol=1e-5)


def test_a_point_of_the_bank_has_distance_zero():
    bank = torch.randn(500, 48) * 30 + 7
    values, indices = nearest(bank, bank)
    assert (values == 0).all() and indices[:, 0].tolist() == list(range(500))


@pytest.mark.parametrize("shape", [(3, 9, 4, 5), (6, 16, 6, 32)])
def test_patch_to_image_equals_brute_force(device, shape):
    images, patches, references, width = shape
    q, r = torch.randn(images, patches, width), torch.randn(references, patches, width)
    got = patch_to_image(q.to(device), r.to(device)).cpu()
    every = torch.cdist(q.flatten(0, 1).double(), r.flatten(0, 1).double())
    expected = every.reshape(images, patches, references, patches).min(-1).values
    assert got.shape == (images, patches, references)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_patch_to_image_of_a_set_with_itself():
    images = torch.randn(5, 16, 12)
    got, copied = patch_to_image(images, images), patch_to_image(images, images.clone())
    torch.testing.assert_close(got, copied, rtol=1e-5, atol=1e-5)
    assert (got[torch.arange(5), :, torch.arange(5)] == 0).all()


def test_a_changed_bank_changes_the_answer():
    queries, bank = torch.randn(20, 8), torch.randn(50, 8)
    before = nearest(queries, bank)[0]
    bank[7] = queries[3]
    after = nearest(queries, bank)[0]
    assert after[3] == 0 and not torch.equal(before, after)


def test_bad_input_says_what_is_wrong():
    bank = torch.randn(10, 4)
    with pytest.raises(ValueError, match="k"):
        nearest(torch.randn(3, 4), bank, k=11)
    with pytest.raises(ValueError):
        nearest(torch.randn(3, 5), bank)
    with pytest.raises(ValueError):
        nearest(torch.randn(3, 4), bank[:0])
    broken = bank.clone()
    broken[6, 1] = np.nan
    with pytest.raises(ValueError, match="6"):
        nearest(torch.randn(3, 4), broken)


def test_devices_are_resolved_or_refused():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="gpu7"):
        resolve_device("gpu7")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            resolve_device("cuda")
