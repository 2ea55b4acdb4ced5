"""Where a number comes from: a hash of the code, versions, the commit, and the memory it took."""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from hclib.paths import repository

ROOMS = ("data", "kernels", "methods", "evaluation")
"""The rooms whose source decides a number; pages and the console script do not."""

_PACKAGES = ("hclib", "numpy", "pandas", "scipy", "scikit-learn", "torch", "timm", "faiss-cpu", "finch-clust")


class SourceError(ValueError):
    """A module or room of `hclib` that does not exist."""


def source_hash(rooms: Sequence[str] = ROOMS, modules: Sequence[str] = ()) -> str:
    """Return 16 hex digits over the code of `hclib`; comments, docstrings and layout do not count.

    Args:
        rooms: packages of `hclib` taken whole, with the modules below the rooms (paths, images).
        modules: full names, such as "hclib.methods.hiercore". When given, only these and the `hclib` modules
            that they import, directly or not, are taken, and `rooms` is not looked at.

    Raises:
        SourceError: a module or room does not exist.
    """
    digest = hashlib.sha256()
    files = _closure(modules) if modules else _room_files(rooms)
    for name in sorted(files):
        digest.update(f"{name}\n{_code(files[name], files[name].stat().st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide numbers, as "version.<package>"."""
    found = {"version.python": platform.python_version()}
    for package in _PACKAGES:
        for name in (package, package.replace("-cpu", "-gpu-cu12")):
            try:
                found[f"version.{package}"] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def git_commit() -> str | None:
    """Return the commit of the checkout, with "+" when `hclib` has uncommitted changes; None outside git."""
    top = repository()
    if top is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=top, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "hclib") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def peak_memory() -> Iterator[dict[str, Any]]:
    """Yield a dict that afterwards holds `peak_mb` (resident memory of this process) and `peak_gpu_mb`.

    Linux resets the high-water mark first; elsewhere the mark is that of the whole process so far, an upper
    bound.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    torch = sys.modules.get("torch")  # only asked where a method has loaded it: this room does not import it
    gpu = torch.cuda if torch is not None and torch.cuda.is_initialized() else None
    if gpu:
        gpu.reset_peak_memory_stats()
    peak: dict[str, Any] = {}
    yield peak
    try:
        status = Path("/proc/self/status").read_text()
        peak["peak_mb"] = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    except (OSError, TypeError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_initialized()
    peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20 if gpu else None


def _room_files(rooms: Sequence[str]) -> dict[str, Path]:
    top = Path(__file__).resolve().parents[1]
    files = {f"hclib.{name}": top / f"{name}.py" for name in ("images", "paths")}
    for room in rooms:
        found = sorted((top / room).rglob("*.py"))
        if not found:
            raise SourceError(f"hclib has no room {room!r}")
        files |= {".".join(("hclib", *path.relative_to(top).with_suffix("").parts)): path for path in found}
    return files


def _closure(modules: Sequence[str]) -> dict[str, Path]:
    """Return the files of modules and of the `hclib` modules that they import, directly or not."""
    files: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        path = _module_file(name)
        if path is None:
            raise SourceError(f"there is no module {name!r}: use full names such as 'hclib.methods.hiercore'")
        files[name] = path
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names if alias.name.split(".")[0] == "hclib"]
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "hclib":
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [full if _module_file(full) else node.module for full in inner]
    return files


def _module_file(name: str) -> Path | None:
    base = Path(__file__).resolve().parents[2].joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _code(path: Path, changed: int) -> str:
    """Return the syntax tree of a file as text, the same for every Python; `changed` keys the cache."""
    return _tree(ast.parse(path.read_bytes()))


def _tree(node: Any) -> str:
    if isinstance(node, list):  # a statement that is only a string is a docstring
        kept = [n for n in node if not (isinstance(n, ast.Expr) and isinstance(getattr(n.value, "value", None), str))]
        return f"[{','.join(map(_tree, kept))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((k, v) for k, v in ast.iter_fields(node) if k not in ("ctx", "kind", "type_comment"))
    inner = ",".join(f"{k}={_tree(v)}" for k, v in fields if v is not None and v != [])
    return f"{type(node).__name__}({inner})"
