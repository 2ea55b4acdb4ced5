"""Records: every computed number, stored once with all that it depends on.

A Record is one flat dict per (config, row): the config's hash and parameters, the metrics, time and memory,
versions, git commit and a hash of the sources. Records lie as JSON lines in
`book/records/<profile>/<experiment>.jsonl`, sorted by config, so that a file does not depend on the order in
which its configs were computed. No machine path is ever stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hclib.evaluation.provenance import SourceError, git_commit, peak_memory, source_hash, versions
from hclib.paths import cache_dir, records_dir

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATH = re.compile(r"(/\w|~/|[A-Za-z]:[\\/]|\\\\|file:)")


class RecordError(ValueError):
    """A config or row that cannot be stored, or a store that cannot be read."""


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits that identify a config; key order does not matter, nor 1 against 1.0.

    Raises:
        RecordError: a value is not plain JSON (dict, list, str, bool, int, finite float, None); it is named.
    """
    text = json.dumps(_plain(config, "config"), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(experiment: str, profile: str) -> pd.DataFrame:
    """Return all Records of an experiment as a frame, NaN where a value is null; empty when there are none.

    Raises:
        RecordError: a line of the store is not a JSON object (file and line are named).
    """
    return _frame(_read(_store(experiment, profile)))


def cached(
    experiment: str,
    profile: str,
    config: Mapping[str, Any],
    compute: Callable[[], pd.DataFrame | Iterable[Mapping[str, Any]]],
    *,
    refresh: bool = False,
    modules: Sequence[str] = (),
) -> pd.DataFrame:
    """Return the Records of a config, computing and storing them when there are none.

    Two processes that ask for the same config compute it once: the second waits and reads.

    Args:
        experiment: name of the store.
        profile: folder of the store (demo, real, paper).
        config: every parameter that the rows depend on, plain JSON. Nested dicts become columns
            "outer.inner".
        compute: gives the rows, a list of flat dicts or a frame. It is timed, and its peak memory is
            measured.
        refresh: compute again even if Records exist, and replace them.
        modules: what `source_hash` covers for these rows; empty means all rooms that decide numbers.

    Returns:
        The rows as read back from the store, so that a first call and a later one give the same. A config
        parameter that has the name of a row's column but another value is kept as "config.<name>". Infinities
        are kept as such.

    Raises:
        RecordError: a value is not plain JSON or is a machine path, or a column has a name that is measured
            here.
    """
    from filelock import FileLock

    key, store = config_hash(config), _store(experiment, profile)
    with FileLock(_lock(store, key)):
        rows = [] if refresh else [row for row in _read(store) if row["config_hash"] == key]
        if not rows:
            rows = _measure(compute, config, modules)
            with FileLock(_lock(store)):
                others = [row for row in _read(store) if row["config_hash"] != key]
                _write(store, sorted(others + rows, key=lambda row: row["config_hash"]))  # stable: rows keep order
    return _frame(json.loads(_line(row)) for row in rows)


def discard(experiment: str, profile: str, **values: Any) -> int:
    """Remove the Records that have these values, such as `page="10_label_scenarios"`; return how many there were.

    Raises:
        RecordError: without a value to select by.
    """
    from filelock import FileLock

    if not values:
        raise RecordError(f"discard of {experiment!r}: name a value to select by; to remove all, delete the file")
    store = _store(experiment, profile)
    with FileLock(_lock(store)):
        rows = _read(store)
        kept = [row for row in rows if any(row.get(key) != value for key, value in values.items())]
        if len(kept) < len(rows):
            _write(store, kept)
    return len(rows) - len(kept)


def stale(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the Records whose code has changed since they were computed."""
    if frame.empty:
        return frame
    now = {text: _source_hash_now(text) for text in set(frame["sources"])}
    return frame[frame["source_hash"] != frame["sources"].map(now)]


def _source_hash_now(sources: str) -> str:
    try:
        return source_hash(modules=tuple(filter(None, sources.split(","))))
    except SourceError:  # a module that the rows were computed with is gone
        return "gone"


def _measure(compute: Callable[[], Any], config: Mapping[str, Any], modules: Sequence[str]) -> list[dict[str, Any]]:
    source = source_hash(modules=modules)  # before the work: a misspelt module should not cost it
    with peak_memory() as peak:
        start = time.perf_counter()
        rows = compute()
        seconds = time.perf_counter() - start
    rows = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else [dict(row) for row in rows]
    if not rows:
        raise RecordError(
            f"config {dict(config)} gave no rows: there would be nothing to store, and it would run each time"
        )
    parameters = dict(_flat(_plain(config, "config")))
    measured = {
        "config_hash": config_hash(config),
        "source_hash": source,
        "sources": ",".join(modules),
        "git_commit": git_commit(),
        "seconds": seconds,
        **peak,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **versions(),
    }
    return [_record(row, parameters, measured, i) for i, row in enumerate(rows)]


def _record(row: dict[str, Any], parameters: dict[str, Any], measured: dict[str, Any], number: int) -> dict[str, Any]:
    row = {str(key): _cell(value, f"row {number}, {key}") for key, value in row.items()}
    if taken := sorted((row.keys() | parameters.keys()) & measured.keys()):
        raise RecordError(f"row {number} or its config has {', '.join(taken)}: these are measured here, rename them")
    kept = {key if row.get(key, value) == value else f"config.{key}": value for key, value in parameters.items()}
    record = {"seed": None} | kept | row | measured
    for key, value in record.items():
        if any(isinstance(v, str) and _PATH.match(v) for v in (value if isinstance(value, list) else [value])):
            raise RecordError(f"row {number}, {key} is {value!r}, a path on this machine: store a name instead")
    return record


def _plain(value: Any, where: str) -> Any:
    """Return `value` as plain JSON with whole floats as ints, or raise naming the value that is not."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return int(value) if value.is_integer() else value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise RecordError(f"{where} has the key {wrong[0]!r}: keys must be strings")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise RecordError(f"{where} is {value!r} ({type(value).__name__}): a config holds plain JSON and finite numbers")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _cell(value: Any, where: str) -> Any:
    """Return one value of a row as plain JSON or a float that may be NaN or infinite."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or value is pd.NaT:
        return None
    return value if isinstance(value, float) else _plain(value, where)


def _store(experiment: str, profile: str) -> Path:
    for name in (experiment, profile):
        if not _NAME.fullmatch(name):
            raise RecordError(f"{name!r} cannot name a store: use letters, digits, '.', '_' and '-'")
    return records_dir() / profile / f"{experiment}.jsonl"


def _lock(store: Path, key: str = "store") -> Path:
    """Return the lock file of a store or of one config in it; it lies in the cache, not in the checkout."""
    folder = cache_dir() / "locks"
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:16]}-{key}.lock"


def _read(store: Path) -> list[dict[str, Any]]:
    rows = []
    lines = store.read_text(encoding="utf-8").splitlines() if store.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["config_hash"]
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(
                f"{store}, line {number} is not a Record ({error}): restore it from git or delete the line"
            ) from None
        rows.append(row)
    return rows


def _write(store: Path, rows: list[dict[str, Any]]) -> None:
    """Write a store beside its place and move it there, so that a reader never sees half a file."""
    store.parent.mkdir(parents=True, exist_ok=True)
    aside = store.with_name(f"{store.name}.{os.getpid()}.tmp")
    aside.write_text("".join(f"{_line(row)}\n" for row in rows), encoding="utf-8", newline="\n")
    aside.replace(store)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_stored(row), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _stored(value: Any) -> Any:
    """Round floats to 6 significant digits; NaN becomes null, infinity the string "Infinity"."""
    if isinstance(value, Mapping):
        return {key: _stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_stored(item) for item in value]
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    infinite = {"Infinity": math.inf, "-Infinity": -math.inf}
    plain = [{k: infinite.get(v, v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    return pd.DataFrame(plain)
