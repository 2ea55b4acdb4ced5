"""Notebooks to pages: parameters, cleaning, and that the committed results belong to the sources."""

import ast
import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hclib import paths
from hclib.book import run
from hclib.evaluation import records

NOTEBOOKS = sorted(run.notebook_sources())
EXECUTED = [
    (profile, name)
    for profile in ("demo", "real")
    for name in NOTEBOOKS
    if name in (run.load_profiles()[profile]["notebooks"])
]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_declares_its_parameters_and_follows_the_rules(name):
    notebook = run.read_source(run.notebook_sources()[name])
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert ":" in line.split("=")[0] and "#" in line, f"{line!r}: a type and a comment each"
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert max(len(source.splitlines()) for source in code) <= 25
    assert (
        sum(
            line.startswith("# ") for c in notebook.cells if c.cell_type == "markdown" for line in c.source.splitlines()
        )
        == 1
    )
    for source in code:
        functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
        assert all(n.end_lineno - n.lineno < 10 for n in functions)


@pytest.mark.parametrize("profile", ["demo", "real", "paper"])
def test_profiles_name_only_parameters_that_exist(profile):
    for name in run.load_profiles()[profile]["notebooks"]:
        declared = set(run.declared_parameters(run.notebook_sources()[name]))
        run.profile_parameters(profile, name, declared)


def test_a_misspelt_parameter_is_an_error():
    with pytest.raises(run.NotebookError, match="no parameter sedes.*seeds"):
        run.execute("demo", ["00"], {"sedes": [1]})


def test_unknown_profiles_and_notebooks_are_errors():
    with pytest.raises(run.NotebookError, match="no profile 'dmeo'"):
        run.execute("dmeo")
    with pytest.raises(run.NotebookError, match="no notebook '77'"):
        run.execute("demo", ["77"])


def test_a_rerun_leaves_the_committed_records_alone(tmp_path, monkeypatch):
    committed = tmp_path / "records"
    monkeypatch.setattr(run, "_top", lambda: tmp_path)
    monkeypatch.setenv("HCLIB_RECORDS", str(committed))
    records.cached("study", "demo", {"seed": 0}, lambda: [{"f1": 0.5}])
    before = (committed / "demo" / "study.jsonl").read_bytes()
    for seed in (1, 2):  # the second rerun keeps what the first one computed
        with run._rerun_records():
            records.cached("study", "demo", {"seed": seed}, lambda: [{"f1": 0.6}])
            assert set(records.load("study", "demo")["seed"]) == set(range(seed + 1))
    assert (committed / "demo" / "study.jsonl").read_bytes() == before
    assert paths.records_dir() == committed


def test_a_second_run_executes_nothing_and_a_changed_page_only_itself(tmp_path, monkeypatch):
    """Every page adds Records, which the others' stamps cover: they must be taken once all pages have run."""
    sources = {name: tmp_path / f"{name}.py" for name in ("10_a", "11_b", "90_claims")}
    for name, source in sources.items():
        profiles = 'profiles: list = ["demo"]  # listed\n' if name.startswith("90") else ""
        source.write_text(f'# %% tags=["parameters"]\nprofile: str = "demo"  # Records\n{profiles}')
    executed = []

    def fake(raw, target, values):
        executed.append(raw.stem)
        if not raw.stem.startswith("90"):
            records.cached(raw.stem, "demo", {"seed": 0}, lambda: [{"f1": 0.5}])
            count = {"page": raw.stem, "claim": "x", "evidence": len(executed)}
            records.cached("claims", "demo", {"page": raw.stem}, lambda: [count], refresh=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("{}")

    monkeypatch.setattr(run, "_top", lambda: tmp_path)
    monkeypatch.setattr(run, "_run", fake)
    monkeypatch.setattr(run, "notebook_sources", lambda: sources)
    notebooks = {"10_a": None, "11_b": None, "90_claims": {"profiles": ["demo"]}}
    monkeypatch.setattr(run, "load_profiles", lambda: {"demo": {"all": {"profile": "demo"}, "notebooks": notebooks}})
    monkeypatch.setattr(run.paths, "results_dir", lambda profile: tmp_path / "results")
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path / "records"))
    run.execute("demo")
    assert executed == list(sources)
    run.execute("demo")
    assert executed == list(sources)
    sources["11_b"].write_text(sources["11_b"].read_text() + "\n# %%\n1\n")
    run.execute("demo")
    assert executed == [*sources, "11_b", "90_claims"]


@pytest.mark.parametrize("profile", ["demo", "real"])
def test_every_recorded_claim_is_on_its_page(profile):
    """A claim that its page no longer makes would stay in the list of what holds."""
    claims = records.load("claims", profile)
    for page, rows in claims.groupby("page"):
        notebook = nbformat.read(paths.results_dir(profile) / f"{page}.ipynb", as_version=4)
        printed = json.dumps([o for cell in notebook.cells for o in cell.get("outputs", [])], ensure_ascii=False)
        for statement in rows["statement"]:
            assert json.dumps(statement, ensure_ascii=False)[1:-1] in printed, f"{page}: {statement}"


def notebook_with(output):
    return new_notebook(cells=[new_markdown_cell("# x"), new_code_cell("1", outputs=[output])])


def test_cleaning_drops_progress_bars_and_times_and_keeps_results():
    notebook = notebook_with(new_output("stream", name="stderr", text="100%|####| 3/3"))
    notebook.cells[1].outputs.append(new_output("stream", name="stdout", text="0.93"))
    notebook.cells[1].metadata = nbformat.from_dict({"papermill": {"duration": 3}, "tags": ["parameters"]})
    notebook.metadata["papermill"] = {"start_time": "now"}
    cleaned = run.clean(notebook)
    assert [o["text"] for o in cleaned.cells[1].outputs] == ["0.93"]
    assert cleaned.cells[1].metadata == {"tags": ["parameters"]}
    assert "papermill" not in cleaned.metadata


def test_machine_paths_are_found():
    leak = f"see {paths.cache_dir()}/features"
    assert run.machine_path(notebook_with(new_output("stream", name="stdout", text="fine\n" + leak))) == leak
    assert run.machine_path(notebook_with(new_output("stream", name="stdout", text="fine"))) is None


def stale_cells(source, executed):
    """Return what differs between a source notebook and an executed one, the injected parameters apart."""
    strip = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    pairs = zip(source.cells, strip, strict=False)
    changed = [a.source for a, b in pairs if (a.cell_type, a.source) != (b.cell_type, b.source)]
    return changed + ["number of cells"] * (len(source.cells) != len(strip))


@pytest.mark.parametrize(("profile", "name"), EXECUTED)
def test_committed_results_belong_to_the_sources(profile, name):
    path = paths.results_dir(profile) / f"{name}.ipynb"
    assert path.is_file(), f"run `hclib run --profile {profile} --only {name}` and commit the result"
    executed = nbformat.read(path, as_version=4)
    assert stale_cells(run.read_source(run.notebook_sources()[name]), executed) == []
    errors = [o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert errors == []
    assert run.machine_path(executed) is None
    values = [c.source for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert values and f'profile = "{profile}"' in values[0]
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code" and c.source)


def test_a_changed_source_is_noticed():
    name = NOTEBOOKS[0]
    source = run.read_source(run.notebook_sources()[name])
    executed = nbformat.from_dict(source)
    assert stale_cells(source, executed) == []
    changed = run.read_source(run.notebook_sources()[name])
    changed.cells[3].source += "\nmore()"
    assert stale_cells(changed, executed) != []


def test_sources_survive_the_round_trip():
    import jupytext

    for name, path in run.notebook_sources().items():
        text = path.read_text()
        again = jupytext.writes(jupytext.reads(text, "py:percent"), "py:percent")
        body = again[again.index("# %%") :]
        assert body.strip() == text.strip(), name
