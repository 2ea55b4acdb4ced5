"""Features: on disk is what the network gave, whatever happened on the way; patch vectors by definition."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hclib.images import ImageError
from hclib.kernels.encoders import Encoder
from hclib.kernels.extraction import CHUNK, HALF_MAX
from hclib.kernels.features import Features, extract, local_patches, patchcore_embedding


class TinyEncoder(Encoder):
    """Two average-pooled maps and their mean as an encoder; counts its batches."""

    def __init__(self, device="cpu", scale=1.0, weights_hash="0"):
        self.name, self.image_size, self.layers, self.token = "tiny", 16, ("fine", "coarse"), "coarse.mean"
        self.mean, self.std, self.weights_hash = (0.5,) * 3, (0.25,) * 3, weights_hash
        self.device, self.scale, self.batches = torch.device(device), scale, []

    def forward(self, batch):
        self.batches.append(len(batch))
        maps = {"fine": F.avg_pool2d(batch, 2), "coarse": F.avg_pool2d(batch, 4)}
        maps = {layer: values.permute(0, 2, 3, 1) * self.scale for layer, values in maps.items()}
        return maps, maps["coarse"].mean(dim=(1, 2))


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for number in range(21):  # no multiple of a chunk
        path = folder / f"{number:02}.png"
        Image.fromarray(rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return pd.DataFrame({"path": paths, "category": np.where(np.arange(21) % 3, "odd", "third")})


def stored(cache):
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def example(index, layers=("a", "b"), grids=((4, 4), (4, 4)), widths=(5, 7), seed=0):
    rng = np.random.default_rng(seed)
    maps = {
        layer: rng.standard_normal((len(index), *grid, width)).astype(np.float16)
        for layer, grid, width in zip(layers, grids, widths, strict=True)
    }
    return Features(maps, rng.standard_normal((len(index), 3)).astype(np.float32), index, {"name": "example"})


# ---- extraction ----


def test_features_are_what_the_encoder_gives(index, tmp_path, device):
    encoder = TinyEncoder(device)
    features = encoder.extract(index, cache=tmp_path / "cache", progress=False)
    maps, tokens = encoder.forward(encoder.prepare(index["path"].tolist()))
    assert len(features) == 21 and features.index is index and features.encoder == encoder.describe()
    for layer, values in maps.items():
        assert isinstance(features.maps[layer], np.memmap) and features.maps[layer].dtype == np.float16
        np.testing.assert_allclose(features.maps[layer], values.cpu().half(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features.tokens, tokens.cpu(), rtol=1e-5, atol=1e-6)
    assert features.tokens.dtype == np.float32


def test_pixels_are_normalised_with_the_statistics_of_the_pretraining():
    grey = np.full((7, 9, 3), 255, np.uint8)
    batch = TinyEncoder().prepare([grey])
    assert batch.shape == (1, 3, 16, 16) and torch.equal(batch, torch.full_like(batch, 2.0))


@pytest.mark.parametrize("batch_size", [1, 8, 13, 1000])
def test_stored_bytes_do_not_depend_on_batch_size(index, tmp_path, batch_size):
    extract(TinyEncoder(), index, cache=tmp_path / "default", progress=False)
    encoder = TinyEncoder()
    extract(encoder, index, batch_size=batch_size, cache=tmp_path / "other", progress=False)
    assert stored(tmp_path / "default") == stored(tmp_path / "other")
    assert encoder.batches == [CHUNK["cpu"]] * 3


def test_second_call_reuses_and_a_changed_byte_rebuilds(index, tmp_path):
    encoder, cache = TinyEncoder(), tmp_path / "cache"
    first = extract(encoder, index, cache=cache, progress=False)
    count = len(encoder.batches)
    again = extract(encoder, index, cache=cache, progress=False)
    assert len(encoder.batches) == count and np.array_equal(first.maps["fine"], again.maps["fine"])
    pixels = np.array(Image.open(index["path"][5]))
    pixels[3, 3] += 100
    stat = os.stat(index["path"][5])
    Image.fromarray(pixels).save(index["path"][5])
    os.utime(index["path"][5], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # content counts, not times
    changed = extract(encoder, index, cache=cache, progress=False)
    differs = [not np.array_equal(first.maps["fine"][row], changed.maps["fine"][row]) for row in range(21)]
    assert len(encoder.batches) > count and np.flatnonzero(differs).tolist() == [5]


@pytest.mark.parametrize(
    "change",
    [
        {"weights_hash": "1"},
        {"image_size": 32},
        {"layers": ("coarse", "fine")},
        {"token": "fine.mean"},
        {"mean": (0.4,) * 3},
        {"name": "other"},
    ],
)
def test_key_covers_the_encoder(index, tmp_path, change):
    extract(TinyEncoder(), index, cache=tmp_path, progress=False)
    encoder = TinyEncoder()
    vars(encoder).update(change)
    extract(encoder, index, cache=tmp_path, progress=False)
    assert len(encoder.batches) > 0 and len(list(tmp_path.glob("*/meta.json"))) == 2


def test_the_same_images_are_encoded_once_whatever_their_order_place_and_number(index, tmp_path):
    cache = tmp_path / "cache"
    whole = extract(TinyEncoder(), index, cache=cache, progress=False)
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = index.assign(path=index["path"].str.replace("/images/", "/moved/"))
    encoder = TinyEncoder()
    for rows in (np.arange(21)[::-1], np.array([3, 3, 20]), np.arange(5, 9), np.arange(21)):
        part = extract(encoder, moved.iloc[rows], cache=cache, progress=False)
        assert np.array_equal(part.tokens, whole.tokens[rows]) and len(part) == len(rows)
        assert all(np.array_equal(part.maps[layer], values[rows]) for layer, values in whole.maps.items())
    assert encoder.batches == []
    Image.new("RGB", (9, 9)).save(moved["path"][0])
    extract(encoder, moved.iloc[:2], cache=cache, progress=False)  # one of the two is new: both are encoded
    assert encoder.batches == [CHUNK["cpu"]]


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_interrupted_extraction_resumes(index, tmp_path, survivors):
    extract(TinyEncoder(), index, cache=tmp_path / "whole", progress=False)
    encoder = TinyEncoder()
    forward = encoder.forward

    def interrupted(batch):
        if len(encoder.batches) == survivors:
            raise KeyboardInterrupt
        return forward(batch)

    encoder.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        extract(encoder, index, batch_size=8, cache=tmp_path / "cut", progress=False)
    assert not list((tmp_path / "cut").glob("*/meta.json"))
    fresh = TinyEncoder()
    extract(fresh, index, batch_size=8, cache=tmp_path / "cut", progress=False)
    assert len(fresh.batches) == 3 - survivors
    assert stored(tmp_path / "whole") == stored(tmp_path / "cut")


def test_marks_are_written_after_the_data(index, tmp_path, monkeypatch):
    """Losing everything that was not flushed must leave no chunk marked that is not there."""
    from hclib.kernels import extraction

    order = []
    flush = np.memmap.flush
    monkeypatch.setattr(
        np.memmap, "flush", lambda array: (order.append(os.path.basename(array.filename)), flush(array))
    )
    extract(TinyEncoder(), index, batch_size=8, cache=tmp_path, progress=False)
    commits = " ".join(name.split(".")[0] for name in order[1:])
    assert commits == " ".join(["fine coarse tokens clipped"] * 3 + ["fine coarse tokens clipped"])
    assert extraction.HALF_MAX == 65504


def test_two_askers_work_once(index, tmp_path):
    encoders = [TinyEncoder(), TinyEncoder()]
    for encoder in encoders:
        encoder.pixels = lambda path, own=encoder: (time.sleep(0.01), TinyEncoder.pixels(own, path))[1]
    results = [None, None]

    def ask(number):
        results[number] = extract(encoders[number], index, cache=tmp_path, progress=False)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(len(encoder.batches) for encoder in encoders) == [0, 3]
    assert np.array_equal(results[0].maps["coarse"], results[1].maps["coarse"])


@pytest.mark.slow
def test_killed_process_and_two_more_leave_whole_features(index, tmp_path):
    index.to_csv(tmp_path / "index.csv")
    program = textwrap.dedent(
        """
        import sys, time
        import pandas as pd
        from tests.test_features import TinyEncoder
        encoder = TinyEncoder()
        pixels = encoder.pixels
        encoder.pixels = lambda path: (time.sleep(float(sys.argv[3])), pixels(path))[1]
        encoder.extract(pd.read_csv(sys.argv[1]), batch_size=8, cache=sys.argv[2], progress=False)
        print(len(encoder.batches))
        """
    )

    def start(pause):
        command = [
            sys.executable,
            "-c",
            program,
            str(tmp_path / "index.csv"),
            str(tmp_path / "cache"),
            str(pause),
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    doomed = start(0.5)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*/clipped.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    doomed.send_signal(signal.SIGKILL)
    doomed.wait()
    outputs = [process.communicate()[0] for process in [start(0), start(0)]]
    assert sum(int(output) > 0 for output in outputs) == 1
    extract(TinyEncoder(), index, cache=tmp_path / "whole", progress=False)
    assert stored(tmp_path / "whole") == stored(tmp_path / "cache")


def test_values_beyond_half_precision_are_clipped_counted_and_told(index, tmp_path):
    with pytest.warns(UserWarning, match="feature values beyond 65504 were clipped"):
        features = extract(TinyEncoder(scale=1e5), index, cache=tmp_path, progress=False)
    exact = extract(TinyEncoder(weights_hash="1"), index, cache=tmp_path / "exact", progress=False)
    assert np.isfinite(features.maps["fine"]).all() and np.abs(features.maps["fine"]).max() == HALF_MAX
    meta = json.loads(next(tmp_path.glob("*/meta.json")).read_text())
    beyond = sum((np.abs(values.astype(np.float32) * 1e5) > HALF_MAX).sum() for values in exact.maps.values())
    assert meta["clipped"] == pytest.approx(beyond, rel=0.01)
    assert np.abs(features.tokens).max() > HALF_MAX or np.isfinite(features.tokens).all()  # tokens keep float32


def test_values_that_are_not_finite_stop_the_extraction(index, tmp_path):
    with pytest.raises(ValueError, match=r"fine is not finite in a chunk from .*00\.png"):
        extract(TinyEncoder(scale=float("nan")), index, cache=tmp_path, progress=False)


def test_unusable_input_is_named(index, tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        extract(TinyEncoder(), index[:0], cache=tmp_path, progress=False)
    with open(index["path"][9], "r+b") as file:
        file.truncate(40)
    with pytest.raises(ImageError, match=r"09\.png"):
        extract(TinyEncoder(), index, cache=tmp_path, progress=False)
    os.remove(index["path"][7])
    with pytest.raises(FileNotFoundError, match=r"07\.png: in the index, not readable"):
        extract(TinyEncoder(), index, cache=tmp_path, progress=False)


def test_full_disk_is_an_error_before_the_work(index, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="0 MiB are free"):
        extract(TinyEncoder(), index, cache=tmp_path, progress=False)


# ---- subset and align ----


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_subsets_are_lazy_and_equal_to_copies(data):
    count = data.draw(st.integers(1, 12))
    features = example(pd.DataFrame({"path": [f"{number}.png" for number in range(count)]}))
    rows = data.draw(
        st.one_of(
            st.lists(st.integers(-count, count - 1), max_size=15),
            st.lists(st.booleans(), min_size=count, max_size=count),
        )
    )
    rows = np.array(rows, dtype=bool if rows and isinstance(rows[0], bool) else int)
    part = features.subset(rows)
    nested = part.subset(np.arange(len(part))[::-2])
    for layer, base in features.maps.items():
        expected = base[rows]
        assert part.maps[layer].shape == expected.shape and len(part) == len(expected)
        assert np.array_equal(part.maps[layer], expected)
        assert np.array_equal(nested.maps[layer], expected[::-2])
        for key in [slice(1, 3), (slice(None), 0), (Ellipsis, 2), (slice(None), 1, slice(2), [0, 3])]:
            assert np.array_equal(part.maps[layer][key], expected[key])
        if len(expected):
            assert np.array_equal(part.maps[layer][-1], expected[-1])
            assert np.array_equal(part.maps[layer][0, 1, 2], expected[0, 1, 2])
    assert part.index["path"].tolist() == features.index["path"].to_numpy()[rows].tolist()
    assert part.index.index.tolist() == list(range(len(part)))
    assert np.array_equal(part.tokens, features.tokens[rows])


def test_subset_reads_nothing_until_indexed(index):
    features = example(index)
    part = features.subset(np.array([7, 2, 11]))
    assert part.maps["a"].base is features.maps["a"]
    run = features.subset(features.index["path"].isin(index["path"][4:9]))
    assert np.shares_memory(run.maps["a"], features.maps["a"])
    features.maps["a"][2] = 9
    assert (part.maps["a"][1] == 9).all()


def test_wrong_subsets_are_refused(index):
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), the features have 21 rows"):
        example(index).subset([True, False, True])
    with pytest.raises(IndexError):
        example(index).subset([21])
    features = example(index)
    with pytest.raises(ValueError, match="'tokens': 20"):
        Features(features.maps, features.tokens[:20], index, {})


def test_align_follows_another_index_of_the_same_files(index):
    features = example(index)
    other = pd.concat([index.iloc[[4, 4, 19]], index.iloc[:2]], ignore_index=True).assign(split="train")
    aligned = features.align(other)
    assert aligned.index is other and np.array_equal(aligned.maps["b"], features.maps["b"][[4, 4, 19, 0, 1]])
    with pytest.raises(ValueError, match=r"1 images of the index were not encoded, first new\.png"):
        features.align(pd.DataFrame({"path": [index["path"][0], "new.png"]}))


# ---- patch vectors ----


def embedding_by_definition(layer2, layer3, dim):
    """PatchCore as its paper and reference program define it, one step after the other."""
    n, _, h, w = layer2.shape
    patches2 = F.unfold(layer2, 3, padding=1).transpose(1, 2)  # (n, h * w, 9 * C2)
    patches3 = F.unfold(layer3, 3, padding=1).unflatten(2, layer3.shape[-2:])  # (n, 9 * C3, h3, w3)
    patches3 = F.interpolate(patches3, size=(h, w), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    pooled = [F.adaptive_avg_pool1d(patches, dim) for patches in (patches2, patches3)]
    return F.adaptive_avg_pool1d(torch.cat(pooled, dim=2), dim).view(n, h, w, dim)


@pytest.mark.parametrize(
    ("widths", "grid", "coarse", "dim"),
    [
        ((512, 1024), (12, 12), (6, 6), 1024),
        ((512, 1024), (7, 10), (4, 5), 1024),
        ((40, 112), (8, 8), (4, 4), 1024),
        ((40, 112), (8, 6), (4, 3), 96),
        ((16, 24), (5, 5), (3, 3), 33),
        ((512, 1024), (4, 4), (2, 2), 512),
    ],
)
def test_patchcore_embedding_equals_its_definition(widths, grid, coarse, dim, device):
    generator = torch.Generator().manual_seed(0)
    layer2 = torch.randn(2, widths[0], *grid, generator=generator)
    layer3 = torch.randn(2, widths[1], *coarse, generator=generator)
    result = patchcore_embedding(layer2.to(device), layer3.to(device), dim)
    assert result.dtype == torch.float32 and result.is_contiguous()
    torch.testing.assert_close(result.cpu(), embedding_by_definition(layer2, layer3, dim), rtol=0, atol=1e-5)


def test_local_patches_of_a_pyramid_are_patchcore(index):
    features = example(index, ("layer2", "layer3"), ((6, 6), (3, 3)), (8, 12))
    stages = [torch.from_numpy(values).float().permute(0, 3, 1, 2) for values in features.maps.values()]
    expected = embedding_by_definition(*stages, 20)
    torch.testing.assert_close(local_patches(features, dim=20), expected, rtol=0, atol=1e-5)
    picked = local_patches(features, features.index["category"] == "third", dim=20)
    torch.testing.assert_close(picked, expected[::3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_local_patches_of_one_grid_average_the_neighbours_that_exist(index, patch_size):
    features = example(index[:40], grids=((5, 4), (5, 4)))
    result = local_patches(features, [3, 0], patch_size=patch_size)
    assert result.shape == (2, 5, 4, 12)
    both = np.concatenate([features.maps["a"], features.maps["b"]], axis=3).astype(np.float32)
    reach = patch_size // 2
    for row, y, x in [(3, 0, 0), (3, 2, 2), (0, 4, 3)]:
        window = both[row, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
        np.testing.assert_allclose(result[[3, 0].index(row), y, x], window.mean(axis=(0, 1)), atol=1e-5)


def test_local_patches_do_not_depend_on_blocks(index, monkeypatch):
    features = example(index)
    whole = local_patches(features)
    monkeypatch.setattr("hclib.kernels.features._BLOCK", 4)
    assert torch.equal(local_patches(features), whole)
    assert local_patches(features, slice(0, 0)).shape == (0, 4, 4, 12)


def test_local_patches_refuse_what_has_no_definition(index):
    with pytest.raises(ValueError, match="odd side"):
        local_patches(example(index), patch_size=2)
    pyramid = example(index, ("layer2", "layer3"), ((6, 6), (3, 3)), (8, 12))
    with pytest.raises(ValueError, match="defined for 3"):
        local_patches(pyramid, patch_size=5)
    with pytest.raises(ValueError, match="second is coarser"):
        local_patches(example(index, ("layer3", "layer2"), ((3, 3), (6, 6)), (8, 12)))
    with pytest.raises(ValueError, match="one grid, or two"):
        local_patches(example(index, ("a", "b", "c"), ((8, 8), (4, 4), (2, 2)), (2, 3, 4)))
