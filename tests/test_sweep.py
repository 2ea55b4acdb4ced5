"""Sweeps: grids to configs, resuming, failures that stop nothing, and the grids that are committed."""

import ast
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hclib import cli
from hclib.book import meds_runs, sweep
from hclib.book import run as book_run
from hclib.book.noise_experiments import SHORT_FUNAD, sweep_configs
from hclib.evaluation import records
from hclib.methods.meds import PROGRAM

GRIDS = sorted((Path(__file__).parents[1] / "notebooks" / "sweeps").glob("*.yml"))
CALLS = []


def compute(config):
    CALLS.append(config)
    if config["x"] == 3:
        raise RuntimeError("no three")
    return pd.DataFrame([{"square": config["x"] ** 2, "dataset": "none", "encoder": "none"}])


def record(experiment, config, function):
    return records.cached(experiment, config["profile"], config, lambda: function(config), modules=("hclib.paths",))


@pytest.fixture
def grid(tmp_path, monkeypatch):
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr("hclib.book.sweep.function", lambda name: {"c": compute, "r": record}[name])
    CALLS.clear()

    def write(**changes):
        content = {"experiment": "e", "compute": "c", "record": "r", "base": {"profile": "demo"}, "grid": {"x": [1, 2]}}
        path = tmp_path / "grid.yml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return path

    return write


def test_a_grid_is_a_product_with_the_first_entry_slowest():
    grid = {
        "base": {"a": {"k": 1, "l": 2}, "z": 0},
        "grid": {"setting one": [{"a": {"k": 5}}, {"a": {"m": [1]}, "z": 9}], "x": [1, 2]},
    }
    assert sweep.configs(grid) == [
        {"a": {"k": 5, "l": 2}, "z": 0, "x": 1},
        {"a": {"k": 5, "l": 2}, "z": 0, "x": 2},
        {"a": {"k": 1, "l": 2, "m": [1]}, "z": 9, "x": 1},
        {"a": {"k": 1, "l": 2, "m": [1]}, "z": 9, "x": 2},
    ]
    assert grid["base"] == {"a": {"k": 1, "l": 2}, "z": 0}


def test_a_sweep_resumes(grid):
    path = grid(grid={"x": [1, 2, 4, 5]})
    assert sweep.run(path, workers=0, limit=1) == (1, 4)
    assert sweep.run(path, workers=0) == (4, 4)
    assert sweep.run(path, workers=0) == (4, 4)
    assert [config["x"] for config in CALLS] == [1, 2, 4, 5]
    assert sorted(records.load("e", "demo")["square"]) == [1, 4, 16, 25]


def test_a_failure_stops_nothing_and_is_told(grid):
    path = grid(grid={"x": [3, 1]})
    with pytest.raises(sweep.SweepError, match="1 of 2 experiments failed, the first: .*no three"):
        sweep.run(path, workers=0)
    assert records.load("e", "demo")["square"].tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": {}}, "may be record and base"),
        ({"grid": {"x": []}}, "grid entry 'x' is"),
        ({"grid": {"x": 3}}, "give a list"),
    ],
)
def test_grids_that_cannot_be_used_are_errors(grid, changes, message):
    with pytest.raises(sweep.SweepError, match=message):
        sweep.load_grid(grid(**changes))


def test_functions_come_from_hclib_alone(tmp_path):
    for name in ("os:system", "hclib.nowhere:f", "hclib.paths:nothing"):
        with pytest.raises(sweep.SweepError, match="write hclib.module:function"):
            sweep.function(name)
    with pytest.raises(sweep.SweepError, match="no readable YAML"):
        sweep.load_grid(tmp_path / "absent.yml")


def test_the_console_script_sweeps(grid, capsys):
    assert cli.main(["sweep", str(grid()), "--workers", "0", "--limit", "1"]) == 0
    assert "1 of 2 experiments have Records" in capsys.readouterr().out
    assert cli.main(["sweep", "absent.yml"]) == 2


@pytest.mark.slow
def test_a_cluster_computes_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path))
    (tmp_path / "g.yml").write_text(
        yaml.safe_dump(
            {
                "experiment": "noise",
                "compute": "hclib.book.noise_experiments:noise_run",
                "record": "hclib.book.noise_experiments:recorded",
                "base": {"profile": "demo", "dataset": "absent", "encoder": "none", "image_size": 1, "seed": 0},
                "grid": {"method": ["PatchCore", "SoftPatch"]},
            }
        )
    )
    with pytest.raises(sweep.SweepError, match="2 of 2 experiments failed.*absent"):
        sweep.run(tmp_path / "g.yml", workers=2)


def parameters(stem):
    """What a page is run with under the profile "real"."""
    profile = book_run.load_profiles()["real"]
    declared = book_run.declared_parameters(book_run.notebook_sources()[stem])
    defaults = {name: ast.literal_eval(value) for name, value in declared.items()}
    shared = {k: v for k, v in profile["all"].items() if k in defaults}
    return defaults | shared | profile["notebooks"][stem]


def asked_31(page):
    base = {k: page[k] for k in ("profile", "dataset", "encoder", "image_size", "size", "layers", "components")}
    base["noise"] = {"definition": "per_normal", "overlap": False}
    methods = dict.fromkeys(["PatchCore", "HierCore", "SoftPatch", "InReaCh"], {"ratio": page["ratio"]})
    methods["FunAD"] = {**SHORT_FUNAD, "epochs": page["epochs"]}
    return sweep_configs(base, methods, page["ratios"], page["seeds"])


def trained(page, settings, ratios):
    names = ("profile", "dataset", "encoder", "image_size", "size", "train_images", "test_normal", "test_anomalous")
    base = {k: page[k] for k in names} | {"draw_seed": 0}
    return meds_runs.runs(base, settings, ratios, page["seeds"])


def asked_41(page):
    student, meds = page["student"], page["meds"]
    students = [meds_runs.alone(student), meds_runs.with_meds(student, meds), meds_runs.memory_alone(meds)]
    return trained(page, [*students, *meds_runs.banks(page["components"], page["methods"])], page["noises"])


def asked_42(page):
    student, meds = page["student"], page["meds"]
    program = [meds_runs.with_meds(student, {**meds, **PROGRAM})]
    rows = list(meds_runs.ablation(student, meds).values())
    return trained(page, rows, page["noises"]) + trained(page, program, [max(page["noises"])])


def asked_43(page):
    student, meds, noisy, clean = page["student"], page["meds"], [], []
    for lengths, settings in ((page["lengths"], noisy), (page["clean_lengths"], clean)):
        for steps in lengths:
            longer = {**student, "steps": steps}
            settings += [meds_runs.alone(longer), meds_runs.with_meds(longer, meds)]
    names = {"ratio": "ratios", "ensembles": "ensembles", "distill_steps": "distillations", "k": "critical"}
    for option, values in {**names, "percent": "percents"}.items():
        for value in page[values]:
            varied = meds_runs.varied(meds, option, value)
            noisy.append(meds_runs.with_meds(student, varied))
            if option in ("ratio", "ensembles"):
                noisy.append(meds_runs.memory_alone(varied))
            if option == "distill_steps":
                noisy.append(meds_runs.with_meds(student, {**varied, "selection": False}))
    return trained(page, noisy, [page["noise"]]) + trained(page, clean, [0])


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_a_committed_grid_is_what_its_page_asks_for(path):
    grids = {grid.stem: {records.config_hash(c) for c in sweep.configs(sweep.load_grid(grid))} for grid in GRIDS}
    asked = globals()[f"asked_{path.stem[:2]}"](parameters(path.stem))
    asked = {records.config_hash(config) for config in asked}
    assert grids[path.stem] <= asked  # nothing is computed for no page
    assert asked <= set().union(*grids.values())  # and nothing is left for the page to compute
