"""Conversions of images and masks are what the docstrings say, and broken files are named."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hclib.images import (
    IMAGE_SUFFIXES,
    ImageError,
    image_shape,
    read_image,
    read_mask,
    read_masks,
    resize_mask,
)

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]


def saved(folder, image, name="image.png", **options):
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s not in (".jpg", ".jpeg", ".webp")])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    path = saved(tmp_path, Image.fromarray(COLOUR), f"image{suffix.upper()}")
    result = read_image(path)
    assert result.dtype == np.uint8 and result.shape == (7, 5, 3)
    np.testing.assert_array_equal(result, COLOUR)
    assert image_shape(path) == (7, 5)


def test_a_result_can_be_written_to(tmp_path):
    read_image(saved(tmp_path, Image.fromarray(COLOUR)))[0, 0] = 0


def test_grey_and_one_bit_are_repeated_on_three_channels(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(GREY))), np.stack([GREY] * 3, 2))
    one_bit = read_image(saved(tmp_path, Image.fromarray(GREY > 99)))
    np.testing.assert_array_equal(one_bit[..., 1], (GREY > 99) * 255)


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_are_divided_by_257_and_not_stretched(tmp_path, name):
    values = np.array([[0, 128, 129, 257], [300, 32767, 65534, 65535]], np.uint16)
    result = read_image(saved(tmp_path, Image.fromarray(values), name))[..., 2]
    np.testing.assert_array_equal(result, [[0, 0, 1, 1], [1, 127, 255, 255]])
    dark = read_image(saved(tmp_path, Image.fromarray(np.array([[0, 4095]], np.uint16)), name))
    assert dark.max() == 16  # a 12-bit camera's white stays dark: the range in use is not guessed


def test_palette_transparency_and_alpha_leave_the_colour_as_stored(tmp_path):
    palette = Image.fromarray(COLOUR).quantize(16)
    path = saved(tmp_path, palette, transparency=3)
    np.testing.assert_array_equal(read_image(path), np.asarray(palette.convert("RGB")))
    alpha = np.dstack([COLOUR, RNG.integers(0, 256, (7, 5), dtype=np.uint8)])
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(alpha))), COLOUR)
    grey_alpha = Image.fromarray(np.dstack([GREY, alpha[..., 3]]))
    np.testing.assert_array_equal(read_image(saved(tmp_path, grey_alpha)), np.stack([GREY] * 3, 2))


def test_cmyk_is_converted(tmp_path):
    white, cyan = Image.new("CMYK", (4, 4), (0, 0, 0, 0)), Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert (read_image(saved(tmp_path, white, "image.tif")) == 255).all()
    assert (read_image(saved(tmp_path, cyan, "image.tif")) == (0, 255, 255)).all()
    assert (read_image(saved(tmp_path, white, "image.jpg")) >= 250).all()


def test_floats_must_lie_in_zero_to_one(tmp_path):
    values = np.array([[0, 0.5, 1]], np.float32)
    path = saved(tmp_path, Image.fromarray(values), "i.tif")
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 128, 255])
    for bad in (1.01, -0.1, np.nan):
        path = saved(tmp_path, Image.fromarray(np.array([[0, bad]], np.float32)), "i.tif")
        with pytest.raises(ImageError, match=r"i\.tif.*convert the file"):
            read_image(path)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # stored turned; viewers turn it by 90 degrees clockwise
    path = saved(tmp_path, Image.fromarray(COLOUR), exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(COLOUR, -1))
    assert image_shape(path) == (5, 7)


def test_first_frame_of_an_animation(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(COLOUR).save(path, save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    np.testing.assert_array_equal(read_image(path), COLOUR)


@pytest.mark.parametrize("reader", [read_image, read_mask, image_shape])
def test_unusable_files_are_named(tmp_path, reader):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name, why in [
        ("absent.png", "no such file"),
        ("empty.png", "0 bytes"),
        ("text.jpg", "no image format"),
    ]:
        with pytest.raises(ImageError, match=rf"{name}.*{why}"):
            reader(tmp_path / name)
    with pytest.raises(ImageError, match="folder.png"):
        reader(tmp_path / "folder.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_truncated_files_are_errors(tmp_path, suffix):
    path = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), f"image{suffix}")
    content = path.read_bytes()
    for share in (0.9, 0.5, 0.02):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ImageError, match="image"):
            read_image(path)


def test_masks_are_true_above_127(tmp_path):
    values = np.array([[0, 127, 128, 255]], np.uint8)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(values))), [[0, 0, 1, 1]])
    wide = Image.fromarray(values.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, wide)), [[0, 0, 1, 1]])
    assert read_mask(saved(tmp_path, Image.fromarray(values > 0))).sum() == 3
    red = np.zeros((1, 4, 3), np.uint8)
    red[0, 2, 0] = 200
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(red))), [[0, 0, 1, 0]])
    palette = Image.new("P", (4, 1))
    palette.putdata([0, 1, 2, 0])
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # the usual colours of segmentation masks
    np.testing.assert_array_equal(read_mask(saved(tmp_path, palette)), [[0, 1, 1, 0]])


def test_masks_of_class_numbers(tmp_path):
    values = np.array([[0, 1, 9, 0]], np.uint8)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(np.uint16))):
        np.testing.assert_array_equal(read_mask(saved(tmp_path, image)), [[0, 1, 1, 0]])
    faint = Image.fromarray(np.array([[0, 90]], np.uint8))  # a grey edge, no class number
    assert not read_mask(saved(tmp_path, faint)).any()
    assert not read_mask(saved(tmp_path, Image.fromarray(values * 0))).any()


def test_mask_of_another_size_is_an_error(tmp_path):
    path = saved(tmp_path, Image.fromarray(GREY))
    assert read_mask(path, (7, 5)).shape == (7, 5)
    with pytest.raises(ImageError, match=r"image\.png: the mask is 5 x 7 pixels, its image 7 x 5"):
        read_mask(path, (5, 7))


def brute_force_average(mask, size):
    """Average of a mask over each output pixel, by enlarging both grids to their common multiple."""
    fine = np.kron(mask, np.ones(size)).astype(float)
    height, width = mask.shape
    return fine.reshape(size[0], height, size[1], width).mean(axis=(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_resize_mask_is_the_area_average(height, width, h, w, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    result, average = resize_mask(mask, (h, w)), brute_force_average(mask, (h, w))
    assert result.shape == (h, w) and result.dtype == bool
    assert result.any() == mask.any()
    if (average >= 0.5).any():
        np.testing.assert_array_equal(result, average >= 0.5 - 1e-9)
    elif mask.any():
        np.testing.assert_array_equal(result, average >= average.max() - 1e-9)


def test_exactly_half_counts_and_a_speck_survives():
    mask = np.zeros((4, 4), bool)
    mask[0] = True  # half of the upper two blocks
    np.testing.assert_array_equal(resize_mask(mask, 2), [[1, 1], [0, 0]])
    speck = np.zeros((1024, 1024), bool)
    speck[700, 300] = True
    small = resize_mask(speck, 224)
    assert small.sum() == 1 and small[700 * 224 // 1024, 300 * 224 // 1024]
    np.testing.assert_array_equal(resize_mask(speck, 1024), speck)
    assert resize_mask(~speck, 224).all()


def test_large_masks_stay_exact():
    mask = np.zeros((5000, 4000), bool)
    mask[:2500] = True
    result = resize_mask(mask, 250)
    assert result[:125].all() and not result[125:].any()


def test_read_masks_in_row_order(tmp_path):
    masks = RNG.random((3, 8, 8)) < 0.5
    paths = []
    for number, mask in enumerate(masks):
        saved(tmp_path, Image.fromarray(GREY).resize((8, 8)), f"{number}.jpg")
        paths.append(str(saved(tmp_path, Image.fromarray(mask), f"{number}_mask.png")))
    images = [str(tmp_path / f"{number}.jpg") for number in range(3)]
    index = pd.DataFrame({"path": images, "mask_path": [paths[0], "", paths[2]]})
    result = read_masks(index, 4)
    assert result.shape == (3, 4, 4) and result.dtype == bool and not result[1].any()
    for row in (0, 2):
        np.testing.assert_array_equal(result[row], resize_mask(masks[row], 4))
    saved(tmp_path, Image.fromarray(GREY), "2.jpg")
    with pytest.raises(ImageError, match="2_mask.png"):
        read_masks(index, 4)


def test_read_masks_of_no_rows():
    assert read_masks(pd.DataFrame({"path": [], "mask_path": []}), 16).shape == (0, 16, 16)
