"""Every folder that the project reads or writes, resolved in one place.

Notebooks run from different working folders (papermill: the caller's, nbval: the notebook's), so nothing else in the
project builds a path from the current folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def repository() -> Path | None:
    """Return the root of the checkout that this module lives in, or None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "_config.yml").is_file() else None


def cache_dir() -> Path:
    """Return the cache of weights, features and the demo set, made if absent: `$HCLIB_CACHE` or `~/.cache/hclib`."""
    folder = Path(os.environ.get("HCLIB_CACHE") or Path.home() / ".cache" / "hclib").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def data_roots() -> list[Path]:
    """Return the folders searched for data sets: those of `$HCLIB_DATA`, then `../shared/data` beside the checkout."""
    roots = [Path(part).expanduser() for part in os.environ.get("HCLIB_DATA", "").split(os.pathsep) if part]
    top = repository()
    if top is not None and (top.parent / "shared" / "data").is_dir():
        roots.append(top.parent / "shared" / "data")
    return roots


def _book(*parts: str) -> Path:
    top = repository()
    if top is None:
        raise FileNotFoundError(
            "the book's folders are part of a checkout: clone the repository and `pip install -e .` it to use them"
        )
    return top.joinpath("book", *parts)


def published_dir() -> Path:
    """Return the folder of the papers' own numbers, one tidy CSV per printed table."""
    return _book("published")


def records_dir() -> Path:
    """Return the folder of Records: `$HCLIB_RECORDS`, or the committed ones."""
    elsewhere = os.environ.get("HCLIB_RECORDS")
    return Path(elsewhere).expanduser() if elsewhere else _book("records")


def results_dir(profile: str) -> Path:
    """Return the folder of the notebooks executed under `profile`."""
    return _book("results", profile)
