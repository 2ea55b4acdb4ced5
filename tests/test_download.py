"""Archives are unpacked safely, what arrives is verified, realmix is rebuilt by its list of names."""

import contextlib
import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hclib.data import download, layouts, realmix
from hclib.data.datasets import load_index
from hclib.data.download import DownloadError, extract, get, verify_mtd
from hclib.data.layouts import DatasetError
from hclib.images import read_image, read_mask, resize_mask
from hclib.paths import data_roots

COOKIES = "computer-vision-defect-detection/cookie-dataset"


def shared(*parts):
    for root in data_roots():
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"{'/'.join(parts)} is in none of the data roots (set HCLIB_DATA)")


def pack(path, files, links=()):
    """Write a .tar.gz of {name: bytes} below a top-level directory, as the host packs repositories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name if name.startswith(("/", "..")) else f"repo-abc/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target, kind in links:
            member = tarfile.TarInfo(f"repo-abc/{name}")
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


def encoded(picture, suffix):
    buffer = io.BytesIO()
    picture.save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return buffer.getvalue()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder that is served as the download host, and an empty cache."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "host"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HCLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HCLIB_DATA", raising=False)
    with contextlib.closing(server.socket):
        yield tmp_path / "host"
        server.shutdown()


def archive(host, repository, commit):
    return host / repository / "archive" / f"{commit}.tar.gz"


def mtd_files():
    names = [f"MT_{kind}/Imgs/exp1_num_{n}" for kind in (*layouts.MTD_DEFECTS, "Free") for n in range(3)]
    return {f"{name}.{suffix}": f"{name}{suffix}".encode() for name in names for suffix in ("jpg", "png")}


def hashes(files):
    """The documented recipe: the hash of `sha256sum *` in each folder."""
    folders = {}
    for path in sorted(files):
        folder, _, name = path.split("/")
        line = f"{hashlib.sha256(files[path]).hexdigest()}  {name}\n"
        folders[folder] = folders.get(folder, "") + line
    return {folder: hashlib.sha256(lines.encode()).hexdigest() for folder, lines in folders.items()}


@pytest.fixture
def mtd(host, monkeypatch):
    monkeypatch.setattr(download, "MTD_SHA256", hashes(mtd_files()))
    return pack(archive(host, *download.MTD), mtd_files() | {"README.md": b"read me"})


def test_mtd_is_fetched_verified_and_found(mtd, tmp_path):
    folder = get("mtd", tmp_path / "data")
    assert folder == tmp_path / "data" / "mtd"
    assert sorted(p.name for p in folder.iterdir()) == sorted(download.MTD_SHA256)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mtd"]
    assert len(load_index("mtd", tmp_path / "data")) == 18
    mtd.unlink()
    (tmp_path / "cache/archives").rename(tmp_path / "gone")
    assert get("mtd", tmp_path / "data") == folder  # already there: no network


def test_the_first_root_of_the_environment_or_the_cache_is_filled(mtd, tmp_path, monkeypatch):
    monkeypatch.setattr(download.datasets, "data_roots", list)  # nothing beside the checkout
    assert get("mtd") == tmp_path / "cache" / "data" / "mtd"
    assert len(load_index("mtd")) == 18
    monkeypatch.undo()


def test_a_changed_file_is_refused_and_nothing_is_left(mtd, host, tmp_path):
    files = mtd_files() | {"MT_Crack/Imgs/exp1_num_2.png": b"changed"}
    pack(archive(host, *download.MTD), files)
    with pytest.raises(DownloadError, match=r"MT_Crack/Imgs: its 6 files are not those of abin24/.* @ cc4eb53"):
        get("mtd", tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("harm", ["change", "remove", "add"])
def test_a_copy_on_disk_is_verified_too(mtd, tmp_path, harm):
    folder = get("mtd", tmp_path / "data")
    victim = folder / "MT_Free/Imgs/exp1_num_1.jpg"
    if harm == "remove":
        victim.unlink()
    else:
        (victim if harm == "change" else victim.with_name("new.jpg")).write_bytes(b"x")
    with pytest.raises(DownloadError, match="MT_Free/Imgs"):
        get("mtd", tmp_path / "data")


def test_something_in_the_way_is_not_overwritten(mtd, tmp_path):
    (tmp_path / "data/mtd").mkdir(parents=True)
    (tmp_path / "data/mtd/mine.txt").write_text("mine")
    with pytest.raises(DownloadError, match="in the way"):
        get("mtd", tmp_path / "data")
    assert (tmp_path / "data/mtd/mine.txt").read_text() == "mine"


def test_no_network_names_the_address_and_the_place(host, tmp_path):
    with pytest.raises(
        DownloadError, match=r"archive/cc4eb53\.tar\.gz: .*404.*put that file at .*cache/archives/abin24--"
    ):
        get("mtd", tmp_path / "data")


def test_a_broken_archive_is_named(host, tmp_path):
    path = archive(host, *download.MTD)
    content = pack(path, mtd_files()).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DownloadError, match="broken archive.*remove it"):
        get("mtd", tmp_path / "data")


@pytest.mark.parametrize("name", ["mvtec", "realiad", "unheard"])
def test_sets_that_are_not_ours_to_fetch(name):
    with pytest.raises(DownloadError, match=rf"{name} is not fetched.*hclib data check {name}"):
        get(name)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\\x"])
def test_paths_out_of_the_archive_are_refused(tmp_path, name):
    path = pack(tmp_path / "a.tar.gz", {name: b"x"})
    with pytest.raises(DownloadError, match="leads out of the archive"):
        extract(path, tmp_path / "in", lambda path: False)  # even where nothing of it is wanted
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_never_written(tmp_path, kind):
    path = pack(tmp_path / "a.tar.gz", {"b.txt": b"x"}, [("a.txt", "/etc/passwd", kind)])
    with pytest.raises(DownloadError, match=r"a\.txt' is a link or a device"):
        extract(path, tmp_path / "all", lambda path: True)
    extract(path, tmp_path / "some", lambda path: path == "b.txt")
    assert [p.name for p in (tmp_path / "some").iterdir()] == ["b.txt"]


def test_the_list_is_that_of_realmix_csv():
    listed = pd.read_csv(shared("realmix.csv"), keep_default_na=False)
    made = [
        (f"realmix/{e.folder}/{e.name}.jpg", *e.folder.split("/"), bool(e.masks))
        for category in realmix.PARTS
        for e in realmix.entries(category)
    ]
    rest = listed[listed["category"] != "magnetic_tile"]
    expected = zip(rest["path"], rest["category"], rest["split"], rest["defect"], rest["mask_path"] != "", strict=True)
    assert sorted(made) == sorted(expected)
    pairing = json.loads(shared("realmix", "screw", "RESTORED_PAIRING.json").read_text())
    found = {f"{e.folder.split('/')[2]}/{e.name}": f"{e.image}.png" for e in realmix.entries("screw") if e.masks}
    assert found == pairing


def test_only_files_of_the_list_are_unpacked():
    assert realmix.is_source("screw", "data/screw/test/1/000(4).png")
    assert realmix.is_source("cookie", f"{COOKIES}/test-images/test-normal-1.jpg")
    assert realmix.is_source("hazelnut_toy", "tests/assets/anomaly_hazelnut/test/colour/00.jpg")
    assert not realmix.is_source("screw", "data/screw/test/000.png")
    assert not realmix.is_source("ball_screw", "README.md")


def fake_repositories(host):
    """Serve a small repository per part, in the upstream layout, with every file that the list needs."""
    rng = np.random.default_rng(0)
    for category, part in realmix.PARTS.items():
        files = {"README.md": b"read me"}
        for entry in realmix.entries(category):
            image, mask = (
                entry.images.replace("*hazelnut*", "x/hazelnut"),
                entry.masks.replace("*hazelnut*", "x/hazelnut"),
            )
            suffix = "png" if category == "screw" else "jpg"
            picture = Image.fromarray(rng.integers(0, 256, (46, 113, 3), dtype=np.uint8))
            files[f"{image}/{entry.image}.{suffix}"] = encoded(picture, suffix)
            if category == "ball_screw" and mask:
                square = [[10.2, 8.1], [60, 8], [60, 30], [10, 30]]
                label = {"imageWidth": 113, "imageHeight": 46, "shapes": [{"points": square}]}
                files[f"{mask}/{entry.name}.json"] = json.dumps(label).encode()
            elif mask:
                shape = np.zeros((46, 113), np.uint8)
                shape[8:30, 10:60] = 255
                name = entry.name if category == "cookie" else f"{entry.name}_mask"
                files[f"{mask}/{name}.png"] = encoded(Image.fromarray(shape), "png")
        pack(archive(host, part.repository, part.commit), files, [("link", "x", tarfile.SYMTYPE)])


@pytest.fixture
def short_list(monkeypatch):
    """Three images a folder, so that making realmix takes no time, and the counts of that short list."""
    whole = realmix.entries

    @functools.cache
    def entries(category):
        seen = {}
        return tuple(e for e in whole(category) if seen.setdefault(e.folder, []).append(e) or len(seen[e.folder]) <= 3)

    monkeypatch.setattr(realmix, "entries", entries)
    realmix._patterns.cache_clear()
    defects = {c: {e.folder.split("/")[2] for e in entries(c) if e.masks} for c in realmix.PARTS}
    counts = {c: (3, 3, 3 * len(defects[c]), len(defects[c])) for c in realmix.PARTS}
    monkeypatch.setitem(download.datasets._UPSTREAM, "realmix", counts | {"magnetic_tile": (2, 1, 15, 5)})


def test_realmix_is_made_from_its_repositories(mtd, host, short_list, tmp_path):
    fake_repositories(host)
    root = get("realmix", tmp_path / "data")
    index = load_index("realmix", root)
    assert index["category"].nunique() == 6 and not [p for p in root.iterdir() if p.name.startswith(".")]
    for category, part in realmix.PARTS.items():
        rows = index[index["category"] == category]
        with Image.open(rows["path"].iloc[0]) as picture:
            assert picture.format == "JPEG" and picture.size == (part.size or (113, 46))
            assert picture.mode == ("L" if part.grey else "RGB")
        square = np.zeros((46, 113), bool)
        square[8:31, 10:61] = True  # polygons include their edges
        expected = square if category == "ball_screw" else square & (np.indices((46, 113)) < [[[30]], [[60]]]).all(0)
        found = read_mask(rows["mask_path"].iloc[-1])
        if part.size is None:
            np.testing.assert_array_equal(found, expected)
        else:  # the box filter and the exact area average differ on the rim only
            assert (found ^ resize_mask(expected, part.size[::-1])).sum() <= 0.1 * found.sum()
        assert part.repository in (root / "realmix" / category / "SOURCE.txt").read_text()
    assert get("realmix", root) == root
    (root / "realmix/cookie/test/good/test-normal-1.jpg").unlink()
    with pytest.raises(DatasetError, match="test-normal-1.jpg: no such file"):
        get("realmix", root)


def test_an_interrupted_making_goes_on_where_it_stopped(mtd, host, short_list, tmp_path):
    fake_repositories(host)
    part = realmix.PARTS["glassfiber"]
    late = archive(host, part.repository, part.commit).rename(tmp_path / "late.tar.gz")
    with pytest.raises(DownloadError, match="idinyte"):
        get("realmix", tmp_path / "data")
    assert sorted(p.name for p in (tmp_path / "data/realmix").iterdir()) == ["ball_screw", "cookie"]
    with pytest.raises(FileNotFoundError):
        load_index("realmix", tmp_path / "data")
    late.rename(archive(host, part.repository, part.commit))
    assert len(load_index("realmix", get("realmix", tmp_path / "data"))["category"].unique()) == 6


def test_another_layout_upstream_is_an_error(mtd, host, short_list, tmp_path):
    fake_repositories(host)
    part = realmix.PARTS["cookie"]
    pack(archive(host, part.repository, part.commit), {f"{COOKIES}/test-images/other.jpg": b"x"})
    with pytest.raises(DatasetError, match=r"has 0 files .*cracked|has 0 files .*anomaly-1\."):
        get("realmix", tmp_path / "data")


def test_polygons_give_the_mask_of_the_benchmark(tmp_path):
    """A label of BSData (CC BY-SA 4.0): the mask made from it is the one behind the committed Records."""
    name = "01_200902053521_585000_090_crop_2"
    expected = read_mask(shared("realmix", "ball_screw", "ground_truth", "pitting", f"{name}_mask.png"))
    points = [
        (772.065, 228.745),
        (768.421, 227.126),
        (767.206, 224.291),
        (767.611, 221.457),
        (770.04, 218.219),
    ]
    points += [
        (777.733, 219.838),
        (782.996, 219.838),
        (781.781, 223.887),
        (775.709, 223.887),
        (773.684, 222.672),
    ]
    label = {"imageWidth": 1130, "imageHeight": 460, "shapes": [{"points": points}]}
    (tmp_path / "label.json").write_text(json.dumps(label))
    realmix._write_mask(tmp_path / "label.json", tmp_path / "mask.png", realmix.PARTS["ball_screw"])
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), expected)


@pytest.mark.slow
def test_the_tree_here_is_the_verified_one():
    verify_mtd(shared("mtd"))


@pytest.mark.slow
def test_a_packed_real_tree_arrives_unchanged(host, tmp_path):
    source = shared("mtd")
    path = archive(host, *download.MTD)
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        tar.add(source, "Magnetic-tile-defect-datasets.-cc4eb53")
    folder = get("mtd", tmp_path / "data")
    here = load_index("mtd", source)
    there = load_index("mtd", folder)
    assert here["path"].str.removeprefix(str(source)).equals(there["path"].str.removeprefix(str(folder)))
    np.testing.assert_array_equal(read_image(there["path"][0]), read_image(here["path"][0]))
