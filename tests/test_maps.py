"""Maps against torch's interpolation and scipy's Gaussian filter, image scores against their definitions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter

from hclib.kernels import maps
from hclib.kernels.maps import Scores, image_scores, smooth, upsample


def patches(*shape, seed=0):
    return np.random.default_rng(seed).gamma(2.0, size=shape).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_upsample_is_bilinear_interpolation(h, w, height, width, align, seed):
    patch = torch.from_numpy(patches(2, h, w, seed=seed))
    expected = F.interpolate(patch[:, None], (height, width), mode="bilinear", align_corners=align)[:, 0]
    torch.testing.assert_close(upsample(patch, (height, width), align_corners=align), expected, atol=2e-5, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 12), st.integers(0, 99))
def test_smooth_is_scipys_gaussian(height, width, sigma, seed):
    values = patches(1, height, width, seed=seed)
    expected = gaussian_filter(values[0].astype(np.float64), sigma, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(smooth(values, sigma)[0], expected, rtol=2e-5, atol=1e-5)


def test_upsample_with_sigma_is_interpolation_then_filter(device):
    patch = torch.from_numpy(patches(3, 16, 16)).to(device)
    expected = F.interpolate(patch[:, None], (224, 200), mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
    expected = np.stack([gaussian_filter(m, 4.0) for m in expected])
    found = upsample(patch, (224, 200), sigma=4.0)
    assert found.device.type == device.type
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=2e-5)


@settings(deadline=None, max_examples=30)
@given(arrays(np.float32, (2, 5, 7), elements=st.floats(-100, 100, width=32)), st.floats(0.1, 6))
def test_smoothing_keeps_the_mean_and_the_range(values, sigma):
    found = smooth(values, sigma)
    np.testing.assert_allclose(found.mean((1, 2)), values.mean((1, 2)), atol=2e-3)
    assert (found <= values.max((1, 2), keepdims=True) + 1e-3).all()
    assert (found >= values.min((1, 2), keepdims=True) - 1e-3).all()


def test_results_do_not_depend_on_the_batch(monkeypatch):
    values = patches(7, 12, 10)
    whole, scored = upsample(values, 50, sigma=2.0), image_scores(values, "map_max", size=50)
    monkeypatch.setattr(maps, "CHUNK_PIXELS", 5000)
    np.testing.assert_array_equal(upsample(values, 50, sigma=2.0), whole)
    np.testing.assert_array_equal(image_scores(values, "map_max", size=50), scored)
    np.testing.assert_array_equal(np.concatenate([upsample(v[None], 50, sigma=2.0) for v in values]), whole)


def test_image_scores_follow_their_definitions():
    values = patches(5, 28, 28)
    np.testing.assert_array_equal(image_scores(values), values.max((1, 2)))
    np.testing.assert_array_equal(image_scores(values, "map_max", size=64), upsample(values, 64).max((1, 2)))
    top = np.sort(values.reshape(5, -1), 1)[:, -math.ceil(0.01 * 784) :]  # 8 of 784
    np.testing.assert_allclose(image_scores(values, "top"), top.mean(1), rtol=1e-6)
    assert isinstance(image_scores(torch.from_numpy(values), "top"), torch.Tensor)
    assert image_scores(values, "map_max").dtype == np.float32
    assert (image_scores(values, "map_max") <= image_scores(values) + 1e-5).all()


def test_half_precision_and_read_only_maps_are_read():
    values = patches(3, 4, 4).astype(np.float16)
    values.flags.writeable = False
    np.testing.assert_allclose(upsample(values, 4), values.astype(np.float32))


@pytest.mark.parametrize(
    "call",
    [
        lambda v: upsample(v[0], 8),
        lambda v: upsample(v, 0),
        lambda v: upsample(v, 8, sigma=-1.0),
        lambda v: smooth(v.astype(int)),
        lambda v: smooth(v, math.nan),
        lambda v: image_scores(v, "mean"),
        lambda v: image_scores(v, "top", fraction=0.0),
        lambda v: Scores(v, v[:, 0, 0], np.zeros(2)),
        lambda v: Scores(v, v[:, 0], np.zeros(3)),
        lambda v: Scores(v * np.array([1, np.nan, 1], np.float32)[:, None, None], v[:, 0, 0], np.zeros(3)),
    ],
)
def test_wrong_input_is_refused(call):
    with pytest.raises(ValueError):
        call(patches(3, 4, 4))


def test_scores_travel_to_disk_and_back_bit_for_bit(tmp_path):
    scores = Scores(patches(4, 5, 6), patches(4), np.array([0, 2, -1, 1]), sigma=2.5, align_corners=True)
    scores.save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    for field in dataclasses.fields(Scores):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(scores, field.name))
    assert (back.patch.dtype, back.image.dtype, back.group.dtype) == (np.float32, np.float32, np.int64)
    np.testing.assert_array_equal(back.upsample(30), upsample(scores.patch, 30, align_corners=True, sigma=2.5))


def test_scores_file_of_another_kind_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"points": patches(3, 2)}, tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="points"):
        Scores.load(tmp_path / "bank.safetensors")
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path / "absent.safetensors")


def test_subset_takes_masks_slices_and_indices():
    scores = Scores(patches(4, 2, 2), np.arange(4.0), np.arange(4), sigma=0.0)
    assert scores.subset(np.array([True, False, False, True])).image.tolist() == [0.0, 3.0]
    assert scores.subset([2, 0]).group.tolist() == [2, 0]
    assert len(scores.subset(slice(1, 3))) == 2
    assert scores.subset([1]).sigma == 0.0
