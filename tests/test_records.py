"""Records: computed once, replaced whole, safe under two processes, stale when code changes, no paths."""

import json
import math
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.evaluation import provenance, records
from hclib.evaluation.records import RecordError, cached, config_hash, load, stale

CONFIG = {
    "method": "patchcore",
    "ratio": 0.1,
    "layers": ["a", "b"],
    "encoder": {"name": "toy", "size": 224},
    "seed": 3,
}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("HCLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "records_dir", lambda: tmp_path / "records")
    return tmp_path / "records" / "demo" / "trial.jsonl"


def rows(value=1.0):
    return [
        {
            "category": "c0",
            "f1": np.float32(value),
            "auroc": float("nan"),
            "threshold": float("inf"),
            "n": np.int64(3),
        },
        {"category": "mean", "f1": value / 3, "auroc": 0.5, "threshold": 1.25, "n": 4},
    ]


def test_second_call_reads_what_the_first_computed():
    calls = []
    first = cached("trial", "demo", CONFIG, lambda: calls.append(1) or rows())
    again = cached("trial", "demo", CONFIG, lambda: calls.append(1) or rows(2))
    assert calls == [1]
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(load("trial", "demo"), first)
    assert first.category.tolist() == ["c0", "mean"]
    assert (first.f1[1], first.threshold[0], first.n.tolist()) == (0.333333, math.inf, [3, 4])
    assert np.isnan(first.auroc[0])


def test_a_record_holds_parameters_metrics_versions_cost_and_origin(store):
    cached("trial", "demo", CONFIG, rows)
    record = json.loads(store.read_text().splitlines()[0])
    assert list(record) == sorted(record)
    assert record["encoder.name"] == "toy" and record["layers"] == ["a", "b"] and record["seed"] == 3
    assert record["config_hash"] == config_hash(CONFIG) and record["source_hash"] == provenance.source_hash()
    assert record["version.torch"] and record["version.numpy"] == np.__version__ and record["version.hclib"]
    assert record["seconds"] >= 0 and record["peak_mb"] > 10 and record["cpus"] >= 1
    assert record["auroc"] is None and record["threshold"] == "Infinity"
    assert "git_commit" in record


def test_time_and_peak_memory_are_those_of_the_work():
    def work():
        block = np.ones(40_000_000)  # 305 MB
        time.sleep(0.05)
        return [{"x": float(block[0])}]

    small = cached("trial", "demo", {"a": 1}, lambda: [{"x": 1.0}])
    large = cached("trial", "demo", {"a": 2}, work)
    later = cached("trial", "demo", {"a": 3}, lambda: [{"x": 1.0}])
    assert large.seconds[0] >= 0.05
    assert large.peak_mb[0] > small.peak_mb[0] + 250
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert later.peak_mb[0] < large.peak_mb[0] - 250  # the high-water mark is reset before each


def test_recomputation_replaces_and_the_file_does_not_depend_on_order(store):
    for value in (1, 2, 3):
        cached("trial", "demo", {"a": value}, lambda v=value: rows(v))
    hashes = [json.loads(line)["config_hash"] for line in store.read_text().splitlines()]
    assert hashes == sorted(hashes) and len(hashes) == 6
    cached("trial", "demo", {"a": 2}, lambda: rows(9)[:1], refresh=True)
    frame = load("trial", "demo")
    assert len(frame) == 5
    assert frame[frame.a == 2].f1.tolist() == [9.0]
    assert not list(store.parent.glob("*.tmp"))


def test_hash_knows_values_not_spelling():
    assert config_hash({"a": 1, "b": [1.0, 2]}) == config_hash({"b": (1, 2.0), "a": 1.0})
    different = [
        {},
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": "1"},
        {"a": True},
        {"a": None},
        {"a": [1]},
        {"a": 0.1 + 0.2},
        {"a": 0.3},
    ]
    assert len({config_hash(config) for config in different}) == len(different)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=5)
)
def test_hash_survives_json_and_key_order(config):
    turned = dict(reversed(list(config.items())))
    assert config_hash(config) == config_hash(json.loads(json.dumps(turned)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"a": {"b": [1, {2}]}}, r"config\['a'\]\['b'\]\[1\] is \{2\} \(set\)"),
        ({"a": np.float64(1)}, "float64"),
        ({"a": float("nan")}, "finite"),
        ({"a": {1: 2}}, "keys must be strings"),
        ({"where": "/data/mvtec"}, "where is '/data/mvtec', a path on this machine"),
        ({"where": "~/x"}, "a path"),
        ({"where": ["a", "/b"]}, "a path"),
        ({"seconds": 3}, "seconds: these are measured"),
    ],
)
def test_bad_configs_are_named(config, says):
    with pytest.raises(RecordError, match=says):
        cached("trial", "demo", config, rows)
    assert load("trial", "demo").empty


def test_bad_rows_and_names_are_refused():
    with pytest.raises(RecordError, match="row 0, x is "):
        cached("trial", "demo", {}, lambda: [{"x": object()}])
    with pytest.raises(RecordError, match="gave no rows"):
        cached("trial", "demo", {}, lambda: [])
    with pytest.raises(RecordError, match="path on this machine"):
        cached("trial", "demo", {}, lambda: [{"file": "C:\\images\\1.png"}])
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(RecordError, match="cannot name a store"):
            load(name, "demo")


def test_a_failing_computation_stores_nothing_and_can_be_repeated():
    with pytest.raises(ZeroDivisionError):
        cached("trial", "demo", CONFIG, lambda: 1 / 0)
    assert load("trial", "demo").empty
    assert len(cached("trial", "demo", CONFIG, rows)) == 2


def test_parameter_and_column_of_one_name():
    frame = cached(
        "trial",
        "demo",
        {"thresholds": ["class"], "size": 256},
        lambda: [{"thresholds": "class", "size": 256}],
    )
    assert frame.thresholds[0] == "class" and frame["config.thresholds"][0] == ["class"]
    assert frame["size"][0] == 256 and "config.size" not in frame


def test_frames_are_taken_too():
    given = pd.DataFrame({"category": ["c0", "c1"], "f1": [0.25, np.nan]})
    found = cached("trial", "demo", CONFIG, lambda: given)
    pd.testing.assert_frame_equal(found[["category", "f1"]], given)


def test_a_broken_line_is_named(store):
    cached("trial", "demo", CONFIG, rows)
    store.write_text(store.read_text() + "<<<<<<< HEAD\n")
    with pytest.raises(RecordError, match=r"trial.jsonl, line 3 is not a Record"):
        load("trial", "demo")


def test_threads_that_ask_for_the_same_compute_it_once_and_lose_nothing():
    calls = []

    def ask(value):
        cached("trial", "demo", {"a": value}, lambda: calls.append(value) or time.sleep(0.05) or rows(value))

    threads = [threading.Thread(target=ask, args=(i % 4,)) for i in range(12)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(calls) == [0, 1, 2, 3]
    assert len(load("trial", "demo")) == 8


def test_processes_that_ask_for_the_same_compute_it_once(store):
    code = """
        import sys, time
        from pathlib import Path
        from hclib.evaluation import records
        records.records_dir = lambda: Path(sys.argv[1])
        def work():
            print("computed"); time.sleep(0.3); return [{"x": 1.0}]
        records.cached("trial", "demo", {"a": 1}, work)
        records.cached("trial", "demo", {"b": int(sys.argv[2])}, lambda: [{"x": 2.0}])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(store.parents[1])]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)]
    assert sum(process.communicate()[0].count("computed") for process in running) == 1
    assert all(process.returncode == 0 for process in running)
    assert len(load("trial", "demo")) == 4


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small stand-in for the package, so that its sources can be edited."""
    files = {
        "paths.py": "",
        "images.py": "",
        "kernels/near.py": '"""Doc."""\nSCALE = 2  # a comment\n',
        "methods/one.py": 'from hclib.kernels import near\ndef f(x):\n """Doc."""\n return x * near.SCALE\n',
        "methods/two.py": "def g(x):\n    return x\n",
        "data/d.py": "",
        "evaluation/provenance.py": "",
        "book/page.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "hclib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "hclib" / "evaluation" / "provenance.py"))
    return tmp_path / "hclib"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_source_hash_ignores_words_and_notices_code(package):
    base = provenance.source_hash()
    edit(package / "methods/one.py", '"""Doc."""', '"""Another."""')
    edit(package / "kernels/near.py", "# a comment", "#")
    edit(package / "methods/one.py", "return x * near.SCALE", "return (x *\n    near.SCALE)")
    (package / "book/page.py").write_text("x = 1\n")
    assert provenance.source_hash() == base
    assert provenance.source_hash(rooms=("book",)) != provenance.source_hash(rooms=("data",))
    edit(package / "kernels/near.py", "2", "3")
    changed = provenance.source_hash()
    assert changed != base
    edit(package / "methods/two.py", "g(x)", "g(y)")
    assert provenance.source_hash() != changed


def test_stale_finds_the_records_whose_code_changed(package):
    cached("trial", "demo", {"a": 1}, rows)
    cached("trial", "demo", {"a": 2}, rows, modules=["hclib.methods.one"])
    cached("trial", "demo", {"a": 3}, rows, modules=["hclib.methods.two"])
    assert stale(load("trial", "demo")).empty
    edit(package / "kernels/near.py", "2", "3")  # method one imports it
    assert set(stale(load("trial", "demo")).a) == {1, 2}
    (package / "methods/two.py").unlink()
    assert set(stale(load("trial", "demo")).a) == {1, 2, 3}
    assert stale(load("none", "demo")).empty


def test_unknown_modules_cost_no_computation(package):
    with pytest.raises(provenance.SourceError, match="hclib.methods.three"):
        cached("trial", "demo", {}, lambda: 1 / 0, modules=["hclib.methods.three"])
    with pytest.raises(provenance.SourceError, match="no room 'attic'"):
        provenance.source_hash(rooms=("attic",))


def test_the_room_does_not_import_torch():
    code = (
        "import sys; from hclib.evaluation import metrics, thresholds, scenarios, records, published;"
        "heavy = {'torch', 'sklearn', 'skimage', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_discard_removes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HCLIB_RECORDS", str(tmp_path))
    for page in ("a", "b"):
        for seed in (0, 1):
            records.cached("claims", "demo", {"page": page, "seed": seed}, lambda: [{"f1": 0.5}])
    assert records.discard("claims", "demo", page="a", seed=1) == 1
    assert records.discard("claims", "demo", page="c") == 0
    left = records.load("claims", "demo")
    assert sorted(zip(left["page"], left["seed"], strict=True)) == [("a", 0), ("b", 0), ("b", 1)]
    with pytest.raises(records.RecordError, match="name a value"):
        records.discard("claims", "demo")
