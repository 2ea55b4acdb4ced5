"""Execute the notebooks: py:percent source -> jupytext -> papermill -> book/results/<profile>, one direction only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jupytext
import nbformat
import papermill
import yaml

from hclib import paths
from hclib.book import report
from hclib.evaluation import records
from hclib.evaluation.records import source_hash

KERNEL = "python3"


class NotebookError(RuntimeError):
    """A notebook cannot be run as asked, or its output may not be stored."""


def _top() -> Path:
    top = paths.repository()
    if top is None:
        raise NotebookError("notebooks are part of a checkout: clone the repository and `pip install -e .` there")
    return top


def notebook_sources() -> dict[str, Path]:
    """Return the notebooks by name, in reading order: `{"00_quickstart": Path(...), ...}`."""
    return {path.stem: path for path in sorted((_top() / "notebooks").glob("[0-9]*.py"))}


def load_profiles() -> dict:
    """Return `notebooks/profiles.yml`: profile -> {"all": parameters, "notebooks": {name: parameters}}."""
    return yaml.safe_load((_top() / "notebooks" / "profiles.yml").read_text())


def read_source(path: Path) -> nbformat.NotebookNode:
    """Convert a py:percent file to a notebook with stable cell ids and the kernel `python3`."""
    notebook = jupytext.read(path)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02d}"
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": KERNEL, "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def declared_parameters(path: Path) -> dict[str, str]:
    """Return the parameters of a notebook's parameters cell: name -> default, as text."""
    cells = [cell for cell in read_source(path).cells if "parameters" in cell.metadata.get("tags", [])]
    lines = [line.partition("#")[0] for line in cells[0].source.splitlines()] if cells else []
    pairs = [line.partition("=") for line in lines if "=" in line]
    return {name.partition(":")[0].strip(): value.strip() for name, _, value in pairs}


def profile_parameters(profile: str, name: str, declared: set[str]) -> dict:
    """Return what `profiles.yml` sets for one notebook.

    Parameters under `all` apply to the notebooks that declare them; those under a notebook's own name must exist there.

    Raises:
        NotebookError: if the profile does not exist or names a parameter that the notebook does not declare.
    """
    profiles = load_profiles()
    if profile not in profiles:
        raise NotebookError(f"no profile {profile!r} in notebooks/profiles.yml, which has {sorted(profiles)}")
    shared = {k: v for k, v in profiles[profile]["all"].items() if k in declared}
    own = profiles[profile]["notebooks"].get(name) or {}
    check_parameters(name, own, declared)
    return {**shared, **own}


def check_parameters(name: str, parameters: dict, declared: set[str]) -> None:
    """Raise NotebookError for a parameter that the notebook does not declare (papermill would only log it)."""
    unknown = sorted(set(parameters) - declared)
    if unknown:
        raise NotebookError(f"{name} has no parameter {', '.join(unknown)}; it declares {', '.join(sorted(declared))}")


def execute(
    profile: str, only: list[str] | None = None, parameters: dict | None = None, *, force: bool = False
) -> list[Path]:
    """Execute the notebooks of a profile whose source, parameters, code or Records changed since they last ran here.

    A run with `parameters` of one's own is a rerun: its notebooks go to `build/rerun/<profile>` and its Records to
    `build/rerun/records`, which starts as a copy of the committed ones; what is committed stays as it is.

    Args:
        profile: "demo", "real" or "paper".
        only: names (or their leading numbers) of the notebooks to run; None for all of the profile.
        parameters: overrides, JSON values.
        force: also run what is current.

    Returns:
        The executed notebooks that were written, in order.

    Raises:
        NotebookError: for unknown profiles, notebooks or parameters, a failing cell, or output with a machine path.
    """
    written, fresh = [], []
    try:
        for name in _select(profile, only):
            source = notebook_sources()[name]
            scratch = _top() / "build" / "notebooks" / profile
            scratch.mkdir(parents=True, exist_ok=True)
            raw = scratch / f"{name}.ipynb"
            nbformat.write(read_source(source), raw)
            declared = set(declared_parameters(source))
            if parameters:
                check_parameters(name, parameters, declared)
            values = {**profile_parameters(profile, name, declared), **(parameters or {})}
            folder = _top() / "build" / "rerun" / profile if parameters else paths.results_dir(profile)
            target = folder / f"{name}.ipynb"
            stamp = scratch / f"{name}.stamp"
            if (
                not (force or parameters)
                and target.exists()
                and stamp.exists()
                and stamp.read_text() == _key(source, values)
            ):
                print(f"   {profile}/{name}: current", flush=True)
                continue
            print(f"   {profile}/{name}: running", flush=True)
            with _rerun_records() if parameters else nullcontext():
                records.discard(report.CLAIMS, profile, page=name)  # the run records those that it still makes
                _run(raw, target, values)
            written.append(target)
            fresh += [] if parameters else [(stamp, source, values)]
    finally:
        for stamp, source, values in fresh:  # only now: later pages have added Records that earlier ones may read
            stamp.write_text(_key(source, values))
    return written


def _select(profile: str, only: list[str] | None) -> list[str]:
    profiles = load_profiles()
    if profile not in profiles:
        raise NotebookError(f"no profile {profile!r} in notebooks/profiles.yml, which has {sorted(profiles)}")
    known = [name for name in notebook_sources() if name in profiles[profile]["notebooks"]]
    if not only:
        return known
    chosen = []
    for wanted in only:
        hits = [name for name in known if name == wanted or name.split("_")[0] == wanted]
        if not hits:
            raise NotebookError(f"no notebook {wanted!r} in profile {profile!r}, which has {', '.join(known)}")
        chosen += hits
    return chosen


def _key(source: Path, values: dict) -> str:
    """Hash what an executed notebook depends on: its text, parameters, hclib and the Records it may read.

    Claims are written by every page and read only by those that list `profiles`.
    """
    digest = hashlib.sha256(source.read_bytes())
    digest.update(json.dumps(values, sort_keys=True).encode())
    digest.update(source_hash(rooms=("data", "kernels", "methods", "evaluation", "book")).encode())
    for profile in values.get("profiles", [values.get("profile", "")]):
        for path in sorted((paths.records_dir() / str(profile)).glob("*.jsonl")):
            if path.stem == report.CLAIMS and "profiles" not in values:
                continue
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _rerun_records() -> Iterator[None]:
    """Let kernels started here read and write a copy of the Records."""
    copy, before = _top() / "build" / "rerun" / "records", os.environ.get("HCLIB_RECORDS")
    if not copy.exists():
        shutil.copytree(paths.records_dir(), copy)
    os.environ["HCLIB_RECORDS"] = str(copy)
    try:
        yield
    finally:
        os.environ.pop("HCLIB_RECORDS")
        if before is not None:
            os.environ["HCLIB_RECORDS"] = before


def _run(raw: Path, target: Path, values: dict) -> None:
    aside = raw.with_suffix(".executed.ipynb")
    try:
        papermill.execute_notebook(
            str(raw),
            str(aside),
            parameters=values,
            kernel_name=KERNEL,
            progress_bar=sys.stderr.isatty(),
            log_output=False,
        )
    except papermill.exceptions.PapermillExecutionError as error:
        text = f"{raw.stem}: cell {error.exec_count} failed with {error.ename}: {error.evalue}; see {aside}"
        raise NotebookError(text) from None
    notebook = clean(nbformat.read(aside, as_version=4))
    leak = machine_path(notebook)
    if leak:
        raise NotebookError(f"{raw.stem} prints a path of this machine: {leak!r}; print names, not paths")
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, aside)
    aside.replace(target)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove run times, progress bars and stderr from an executed notebook, so that equal runs give equal files."""
    notebook.metadata.pop("papermill", None)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i:02d}"
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "papermill-error-cell-tag"]
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            if output.get("name") == "stderr" and "it/s" not in output["text"] and "image/s" not in output["text"]:
                print(output["text"], file=sys.stderr)
            output.get("metadata", {}).clear()
        widgets = "application/vnd.jupyter.widget-view+json"
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and widgets not in o.get("data", {})]
    notebook.metadata.pop("widgets", None)
    return notebook


def machine_path(notebook: nbformat.NotebookNode) -> str | None:
    """Return the first line of text output that holds a path of this machine, or None."""
    folders = [str(_top().parent) + "/", str(Path.home()) + "/", str(paths.cache_dir()), sys.prefix]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
            for line in "\n".join(map(str, texts)).splitlines():
                if any(folder in line for folder in folders if len(folder) > 2):
                    return line.strip()[:160]
    return None
