"""The committed tables: complete, consistent with a recomputation, joined with ours the right way round."""

import re

import numpy as np
import pandas as pd
import pytest

from hclib.evaluation.published import PublishedError, compare, footnotes, load_published
from hclib.paths import data_roots, published_dir

COLUMNS = [
    *("paper", "table", "dataset", "method", "train_setting", "eval_setting", "noise_ratio", "class"),
    *("level", "metric", "value", "unit", "note", "param", "param_value"),
]


def tables():
    found = []
    for path in sorted(published_dir().glob("*_*.csv")):
        paper, table = re.fullmatch(r"(\w+_readme|\w+?)_(?:table_?)?(\w+)", path.stem).groups()
        found.append((path, paper, re.sub(r"^([ab])(\d)", r"\1.\2", table)))
    return found


def test_every_table_is_there_and_reads():
    assert len(tables()) == 73
    total = 0
    for path, paper, table in tables():
        frame = load_published(paper, table)
        total += len(frame)
        assert list(frame.columns) == [*COLUMNS, "printed"], path.name
        assert len(frame) and frame.value.notna().all() and frame.metric.ne("").all(), path.name
        assert set(frame.unit) <= {
            "percent",
            "fraction",
            "count",
            "bool",
            "minutes",
            "fps",
            "ms",
            "MB",
            "seconds",
        }
    assert total == 15_641


def test_the_committed_folder_stays_small_and_holds_no_machine_path():
    sizes = {path.name: path.stat().st_size for path in published_dir().iterdir()}
    assert sum(sizes.values()) < 2_000_000
    assert not any(re.search(r"(^|[\s,\"])/(work|root|home|tmp)/", p.read_text()) for p in published_dir().iterdir())


def test_the_copies_equal_their_source():
    folders = [root.parent / "paper_tables" for root in data_roots()]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        pytest.skip("the source of the tables is not on this machine")
    for path in folder.glob("*.csv"):
        assert (published_dir() / path.name).read_text() == path.read_text(), path.name


def test_names_are_found_as_printed():
    for name in ("B.11", "b.11", "B11"):
        assert set(load_published("hiercore", name)["table"]) == {"B.11"}
    assert set(load_published("HierCore", 4)["table"]) == {"4"}
    assert load_published("meds", 1).noise_ratio.unique().tolist() == [0, 10, 20, 40]
    assert load_published("meds", 1).printed[0] == "98.80"
    with pytest.raises(PublishedError, match="hiercore_table_b11"):
        load_published("hiercore", "B.15")
    with pytest.raises(PublishedError, match="funad, hiercore, meds, musc"):
        load_published("hyperion", 1)


def test_means_of_table_4_are_those_of_the_classes_in_the_appendix():
    mean = load_published("hiercore", 4).query("dataset == 'VisA' and metric == 'f1'")
    classes = load_published("hiercore", "B.12").query("metric == 'f1' and `class` != 'mean'")
    keys = ["method", "eval_setting", "level"]
    both = classes.groupby(keys).value.mean().to_frame("classes").join(mean.set_index(keys).value)
    assert len(both) == 24
    assert (both.classes - both.value).abs().max() < 0.11


def test_compare_puts_ours_beside_the_paper():
    paper = load_published("hiercore", "B.11").query("method == 'HierCore' and eval_setting == 'unknown'")
    ours = pd.DataFrame({"category": ["cable", "bottle", "own"], "level": "image", "f1": [0.5, 0.992, 1.0], "x": 1})
    frame = compare(ours, paper, ["category", "level"], "f1")
    assert list(frame.columns) == ["category", "level", "ours", "paper", "difference"]
    assert frame.category.tolist() == ["cable", "bottle", "own"]
    cable = float(paper.query("`class` == 'cable' and level == 'image'").printed.item()) / 100
    assert frame.paper[0] == pytest.approx(cable) and frame.difference[0] == pytest.approx(0.5 - cable)
    assert frame.difference[1] == pytest.approx(0, abs=1e-12)
    assert np.isnan(frame.paper[2]) and np.isnan(frame.difference[2])
    renamed = ours.rename(columns={"category": "what", "f1": "score"})
    other = compare(renamed, paper, {"what": "class", "level": "level"}, "f1", column="score")
    assert other.difference[:2].tolist() == frame.difference[:2].tolist()


def test_fractions_and_counts_keep_their_unit():
    mad = load_published("hiercore", 3).query(
        "method == 'PatchCore' and level == 'image' and train_setting == 'multi-class'"
    )
    ours = pd.DataFrame({"dataset": ["MVTec AD", "BTAD"], "mad": [0.99, 0.95]})
    assert compare(ours, mad, ["dataset"], "mad").paper.tolist() == [0.992, 0.956]
    counts = load_published("hiercore", 2).query("dataset == 'MVTec AD'")
    ours = pd.DataFrame({"category": ["screw"], "train": [320]})
    assert compare(ours, counts, ["category"], "train_normal_count", column="train").difference.tolist() == [0]


def test_compare_refuses_what_is_not_one_to_one():
    paper = load_published("hiercore", "B.11")
    ours = pd.DataFrame({"category": ["bottle"], "level": ["image"], "f1": [0.9]})
    with pytest.raises(PublishedError, match="narrow method, eval_setting first"):
        compare(ours, paper, ["category", "level"], "f1")
    one = paper.query("method == 'HierCore' and eval_setting == 'known'")
    with pytest.raises(PublishedError, match="metric 'auroc' is not published here"):
        compare(ours.assign(auroc=1.0), one, ["category", "level"], "auroc")
    with pytest.raises(PublishedError, match="frame ours lacks the columns f1"):
        compare(ours.drop(columns="f1"), one, ["category"], "f1")
    with pytest.raises(PublishedError, match="no row in common"):
        compare(ours.assign(category="Bottle"), one, ["category", "level"], "f1")


def test_corrections_belong_to_tables_and_data_sets_that_exist():
    notes = pd.read_csv(published_dir() / "corrections.csv", dtype=str, keep_default_na=False)
    assert list(notes.columns) == ["paper", "table", "dataset", "kind", "note"]
    assert not notes.duplicated().any() and notes.note.str.endswith(".").all()
    readme = (published_dir() / "README.md").read_text()
    assert all(f"| `{kind}` |" in readme for kind in set(notes.kind))
    for (paper, table), part in notes.groupby(["paper", "table"]):
        known = set(load_published(paper, table).dataset) | {""}
        assert set(part.dataset) <= known, (paper, table, set(part.dataset) - known)


def test_footnotes_say_what_a_page_must_say():
    mpdd = footnotes("hiercore", "B.13")
    assert any("InvAD repeats ViTAD" in note for note in mpdd)
    assert footnotes("hiercore", 4, "VisA") != footnotes("hiercore", 4, "MPDD")
    assert any(note.startswith("MPDD: ") for note in footnotes("hiercore", 4, "MPDD"))
    assert not any(note.startswith("MPDD: ") for note in footnotes("hiercore", 4, "VisA"))
    assert any("40 % table" in note for note in footnotes("meds", 12))
    assert footnotes("funad", 2) == []
    with pytest.raises(PublishedError):
        footnotes("hiercore", 99)


def test_the_copied_column_is_really_a_copy():
    cells = load_published("hiercore", "B.13").query("`class` != 'mean'")
    wide = cells.pivot_table(index=["class", "eval_setting", "level"], columns="method", values="value")
    assert len(wide) == 24 and (wide.InvAD == wide.ViTAD).all()
