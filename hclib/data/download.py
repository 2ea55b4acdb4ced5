"""Fetch and verify the public data sets, so that a reader has what the book was computed on.

The archives that the host packs on demand have no lasting hash, so it is the unpacked files that are
verified: mtd by one sha256 per folder of the upstream tree. The other parts of realmix are converted
(`hclib.data.realmix`) and checked by name and count only.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from hclib.data import datasets, layouts, realmix
from hclib.paths import cache_dir, data_roots

HOST = "https://github.com"
MTD = ("abin24/Magnetic-tile-defect-datasets.", "cc4eb53")
MTD_SHA256 = {  # cd MT_X/Imgs && LC_ALL=C sha256sum * | sha256sum
    "MT_Blowhole": "17aac7b519b456c49434b7c0d59d2afa06e6252269703b0a3dc240e77fb553b8",
    "MT_Break": "db6771ae70da2e3ba4878f59766434de4b4f8fcf8109bc5df07ab209277a6e1f",
    "MT_Crack": "9447b693c3a087acdc8061eecd1cbb1a98ef13ffc7667c80a349ef9b2cab3b4c",
    "MT_Fray": "d936ba9f22f5429caed63628c90ec202cdbf6ac62fbc38349211b9374c438f54",
    "MT_Free": "d289c4c0d9be43636935aa8ea192e6365daf0885505d63e3a8e56551ff43dad8",
    "MT_Uneven": "117fcf46f5a2839bbfeb55a88c9db04e9fa05fb5b5b18ad534e7674dc9d1137d",
}


class DownloadError(ValueError):
    """A data set that cannot be fetched, or arrived different from what it should be."""


def get(name: str, root: str | Path | None = None) -> Path:
    """Fetch a public data set unless it is there already, verify it, and return its folder.

    Args:
        name: "mtd", "realmix" (which includes mtd) or "demo".
        root: the folder to put it in; by default the first of `$HCLIB_DATA`, or else the cache.

    Raises:
        DownloadError: when the set is not to be fetched by a program (the message says where it is), the
            network or the archive fails, or the files differ from what they should be.
    """
    if name == "demo":
        from hclib.data.demo import render_demo

        return render_demo(root)
    if name not in ("mtd", "realmix"):
        home = datasets.SOURCES[name].home if name in datasets.SOURCES else "not known here"
        raise DownloadError(
            f"{name} is not fetched by this program; its home is {home}. Unpack it below a folder of "
            f"HCLIB_DATA and run `hclib data check {name}`"
        )
    try:
        found = datasets.locate(name, root)
    except FileNotFoundError:
        base = Path(root or (data_roots()[0] if os.environ.get("HCLIB_DATA") else cache_dir() / "data")).absolute()
        base.mkdir(parents=True, exist_ok=True)
        found = _get_mtd(base) if name == "mtd" else _get_realmix(base)
    if name == "mtd":
        verify_mtd(found)
    elif (report := datasets.check(name, found))["problem"].any():
        wrong = report[report["problem"] != ""].to_string(index=False)
        raise DownloadError(f"{found}: image counts differ; remove realmix/ and realmix.csv, fetch again:\n{wrong}")
    return found


def verify_mtd(folder: Path) -> None:
    """Compare every file of MTD's upstream tree with the committed hashes.

    Raises:
        DownloadError: for the first folder that differs.
    """
    for name, expected in MTD_SHA256.items():
        files = sorted((folder / name / "Imgs").glob("[!.]*"), key=lambda path: path.name)
        lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
        if hashlib.sha256(lines.encode()).hexdigest() != expected:
            raise DownloadError(
                f"{folder / name / 'Imgs'}: its {len(files)} files are not those of {MTD[0]} @ {MTD[1]}; "
                "remove the folder and fetch it again"
            )


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """Unpack the wanted files of a repository's archive into `folder`, without its top-level directory.

    Args:
        archive: a .tar.gz file.
        folder: where to; made if absent.
        wanted: asked with each path inside the repository.

    Raises:
        DownloadError: when a path would leave `folder`, a wanted member is a link or a device, or the archive
            is broken.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or "\\" in member.name:
                    raise DownloadError(f"{archive}: {member.name!r} leads out of the archive; nothing of it is used")
                if member.isdir() or not wanted("/".join(path.parts[1:])):
                    continue
                if not member.isfile():
                    raise DownloadError(f"{archive}: {member.name!r} is a link or a device; nothing of it is used")
                target = folder.joinpath(*path.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DownloadError(f"{archive}: a broken archive ({error}); remove it and fetch it again") from error


def _get_mtd(base: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=base, prefix=".mtd-") as aside:
        extract(_fetch(*MTD), Path(aside) / "mtd", lambda path: path.startswith("MT_"))
        verify_mtd(Path(aside) / "mtd")
        _move(Path(aside) / "mtd", base / "mtd")
    return base / "mtd"


def _get_realmix(base: Path) -> Path:
    """Make the parts that are not there yet, and last the list that declares the benchmark complete."""
    get("mtd", base)
    for category, part in realmix.PARTS.items():
        if not (base / "realmix" / category).exists():
            with tempfile.TemporaryDirectory(dir=base, prefix=f".{category}-") as aside:
                raw, made = Path(aside) / "raw", Path(aside) / "made"
                extract(_fetch(part.repository, part.commit), raw, partial(realmix.is_source, category))
                realmix.convert(category, raw, made)
                (base / "realmix").mkdir(exist_ok=True)
                _move(made, base / "realmix" / category)
    rows = layouts.mtd(datasets.locate("mtd", base)) + layouts.folder(base / "realmix")
    rows = [row for row in rows if row[2] in (*realmix.PARTS, "magnetic_tile")]
    index = pd.DataFrame(rows, columns=["path", "mask_path", "category", "split", "defect"])
    for column in ("path", "mask_path"):
        index[column] = [Path(path).relative_to(base).as_posix() if path else "" for path in index[column]]
    index.insert(4, "label", (index["defect"] != "good").astype(int))
    index.to_csv(base / "realmix.csv", index=False)
    return base


def _move(made: Path, target: Path) -> None:
    if target.exists():
        raise DownloadError(f"{target}: in the way, and not the data set expected there; move it elsewhere")
    os.replace(made, target)


def _fetch(repository: str, commit: str) -> Path:
    """Download the archive of a repository at a commit into the cache, or return the one that is there."""
    import pooch

    url = f"{HOST}/{repository}/archive/{commit}.tar.gz"
    name, folder = f"{repository.replace('/', '--')}-{commit}.tar.gz", cache_dir() / "archives"
    try:
        return Path(pooch.retrieve(url, None, fname=name, path=folder, progressbar=True))
    except (OSError, ValueError) as error:  # the errors of requests are OSErrors
        raise DownloadError(f"{url}: {error}; check the network, or put that file at {folder / name}") from error
