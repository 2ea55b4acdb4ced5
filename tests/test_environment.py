"""The set-up files tell one story: pyproject.toml, environment.yml, the Makefile, and what importing costs."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "faiss-gpu": "faiss-cpu"}
CONDA_ONLY = {"pip", "cuda-version"}


def _split(requirement: str) -> tuple[str, str]:
    name, bounds = re.fullmatch(r"([A-Za-z0-9_-]+)\s*(.*)", requirement.strip()).groups()
    return name.lower(), ",".join(sorted(bounds.replace(" ", "").split(",")))


def _pyproject() -> dict[str, str]:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    return dict(map(_split, wanted)) | {"python": _split("python" + project["requires-python"])[1]}


def _environment(text: str) -> dict[str, str]:
    entries = yaml.safe_load(text)["dependencies"]
    pip = next(e["pip"] for e in entries if isinstance(e, dict))
    plain = [e for e in entries if isinstance(e, str)] + [e for e in pip if not e.startswith("-e")]
    pairs = dict(map(_split, plain))
    return {CONDA_NAMES.get(k, k): v for k, v in pairs.items() if k not in CONDA_ONLY}


def test_environment_yml_equals_pyproject():
    assert _environment((TOP / "environment.yml").read_text()) == _pyproject()


def test_the_comparison_notices_another_version():
    text = (TOP / "environment.yml").read_text().replace("numpy >=2.0", "numpy >=1.26")
    assert _environment(text) != _pyproject()


def test_import_takes_under_a_third_of_a_second():
    code = "import time; t = time.perf_counter(); import hclib; print(time.perf_counter() - t)"
    best = min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    assert best < 0.3


def test_import_loads_nothing_heavy():
    code = (
        "import sys, hclib; print([m for m in ('torch', 'numpy', 'pandas', 'faiss', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_doors_hold():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_wrong_door_is_noticed(tmp_path):
    """The contracts are not vacuous: the same contracts fail on a copy whose data room imports a kernel."""
    import shutil

    shutil.copytree(TOP / "hclib", tmp_path / "hclib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    with (tmp_path / "hclib" / "data" / "datasets.py").open("a") as file:
        file.write("\nfrom hclib.kernels import distances\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "hclib.data.datasets -> hclib.kernels.distances" in done.stdout


def test_no_module_is_long():
    lengths = {p.relative_to(TOP).as_posix(): len(p.read_text().splitlines()) for p in (TOP / "hclib").rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 420} == {}


def test_make_help_names_the_targets():
    text = subprocess.check_output(["make", "-s", "help"], cwd=TOP, text=True)
    for target in ("book", "test", "lab", "real", "help"):
        assert re.search(rf"make {target}\b", text)


@pytest.mark.parametrize("arguments", [[], ["detect"], ["run"], ["data"]])
def test_every_command_has_help(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "hclib.cli", *arguments, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: hclib")


def test_help_is_quick():
    """`hclib --help` must not import torch: it answers at once."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hclib.cli", "--help"], capture_output=True, check=True)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, check=True)
    assert bare - start < time.perf_counter() - bare
