"""Grids of experiments: a YAML file in, Records out, computed by worker processes of a local Dask cluster.

    experiment: noise_sweep                           # the store of the Records
    compute: hclib.book.noise_experiments:noise_run   # config -> frame
    record: hclib.book.noise_experiments:recorded     # optional; hclib.book.experiments:recorded by default
    base: {profile: real, dataset: mtd}               # what all configs share
    grid:                                             # the product of these, the first varying slowest
      seed: [0, 1]
      setting method:                                 # "setting ...": mappings merged into the config
        - {method: PatchCore, options: {ratio: 0.1}}
        - {method: SoftPatch, options: {ratio: 0.1}}

What has a Record is not computed again, so an interrupted sweep resumes by being started again.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hclib.evaluation import records

KEYS = {"experiment", "compute", "record", "base", "grid"}


class SweepError(ValueError):
    """A grid file that cannot be used, or experiments that failed."""


def load_grid(path: str | Path) -> dict[str, Any]:
    """Read a grid file.

    Raises:
        SweepError: no readable YAML, unknown or missing keys, a function that is not there, an entry without values.
    """
    try:
        grid = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SweepError(f"{path}: no readable YAML file ({error})") from None
    if not isinstance(grid, dict) or set(grid) - KEYS or not {"experiment", "compute", "grid"} <= set(grid):
        raise SweepError(f"{path}: its keys must be experiment, compute and grid, and may be record and base")
    for name, values in grid["grid"].items():
        if not isinstance(values, list) or not values:
            raise SweepError(f"{path}: grid entry {name!r} is {values!r}; give a list of at least one value")
    grid = {"base": {}, "record": "hclib.book.experiments:recorded", **grid}
    function(grid["compute"]), function(grid["record"])
    return grid


def function(name: str) -> Callable:
    """Return `hclib.module:function`; a grid can call nothing else."""
    module, _, attribute = name.partition(":")
    try:
        if not module.startswith("hclib."):
            raise AttributeError("not a module of hclib")
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SweepError(f"{name!r}: {error}; write hclib.module:function") from None


def configs(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every config of a grid: the base, and one value of each entry merged into it."""
    found = []
    for values in itertools.product(*grid["grid"].values()):
        config = copy.deepcopy(grid["base"])
        for name, value in zip(grid["grid"], values, strict=True):
            _merge(config, value if name.startswith("setting") else {name: value})
        found.append(config)
    return found


def _merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            _merge(config[key], value)
        else:
            config[key] = copy.deepcopy(value)


def attempt(grid: Mapping[str, Any], config: dict[str, Any]) -> str | None:
    """Compute and store the Records of one config; return what went wrong, or None. Workers call this."""
    try:
        function(grid["record"])(grid["experiment"], config, function(grid["compute"]))
    except Exception as error:
        return f"{config}: {type(error).__name__}: {error}"


def run(path: str | Path, *, workers: int = 1, limit: int | None = None) -> tuple[int, int]:
    """Compute what is missing of a grid; an experiment that fails stops no other.

    Args:
        path: the grid file.
        workers: worker processes of one thread each; 0 computes in this process.
        limit: compute at most so many.

    Returns:
        How many configs have Records now, and how many there are.

    Raises:
        SweepError: a grid that cannot be used, or experiments that failed (counted, the first is named).
    """
    grid = load_grid(path)
    every = configs(grid)
    stored = [records.load(grid["experiment"], profile) for profile in {config["profile"] for config in every}]
    known = {key for frame in stored if len(frame) for key in frame["config_hash"]}
    missing = [config for config in every if records.config_hash(config) not in known]
    todo = missing[:limit]
    outcomes = _on_cluster(grid, todo, workers) if workers and todo else (attempt(grid, config) for config in todo)
    failed = []
    for number, error in enumerate(outcomes, 1):
        failed += [error] if error else []
        print(f"   {number} of {len(todo)}: {error or 'stored'}", flush=True)
    if failed:
        raise SweepError(f"{len(failed)} of {len(todo)} experiments failed, the first: {failed[0]}")
    return len(every) - len(missing) + len(todo), len(every)


def _on_cluster(grid: Mapping[str, Any], todo: list[dict], workers: int) -> Iterator[str | None]:
    from distributed import Client, LocalCluster, as_completed

    with LocalCluster(workers, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        futures = [client.submit(attempt, grid, config, pure=False) for config in todo]
        yield from (future.result() for future in as_completed(futures))
