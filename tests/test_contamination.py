"""Contaminated training sets: counts, strata, overlap, nesting and seeds as properties; manifests there and back."""

import math
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hclib.data.contamination import (
    MANIFEST,
    apply_manifest,
    contaminate,
    load_manifest,
    realised,
    realised_ratio,
    save_manifest,
)
from hclib.data.layouts import DatasetError
from hclib.paths import data_roots

COLUMNS = ["path", "mask_path", "category", "split", "label", "defect"]


def make_index(normals=(20, 12), kinds=((9, 3), (4, 4, 4)), test_normals=3):
    """An index frame with one category per entry, and kinds of defect with the given numbers of images."""
    rows = []
    for c, (count, defects) in enumerate(zip(normals, kinds, strict=True)):
        name = f"cat{c}"
        rows += [(f"/data/{name}/train/good/{i:03}.png", "", name, "train", 0, "good") for i in range(count)]
        rows += [(f"/data/{name}/test/good/{i:03}.png", "", name, "test", 0, "good") for i in range(test_normals)]
        for d, number in enumerate(defects):
            stem = f"/data/{name}/test/kind{d}"
            rows += [(f"{stem}/{i:03}.png", f"{stem}/{i:03}_m.png", name, "test", 1, f"kind{d}") for i in range(number)]
    index = pd.DataFrame(rows, columns=COLUMNS)
    index.attrs["name"] = "made"
    return index


specs = st.fixed_dictionaries(
    {
        "kinds": st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3),
        "normals": st.integers(1, 60),
        "ratio": st.floats(0, 0.9),
        "definition": st.sampled_from(["per_normal", "of_total"]),
        "overlap": st.booleans(),
        "cap": st.sampled_from([0.0, 0.5, 0.75, 1.0]),
        "seed": st.integers(0, 5),
    }
)


def run(spec, **changes):
    spec = {**spec, **changes}
    index = make_index([spec["normals"]] * len(spec["kinds"]), spec["kinds"])
    options = {k: spec[k] for k in ("seed", "overlap", "definition", "cap")}
    return index, *contaminate(index, spec["ratio"], **options)


def train_anomalies(index):
    return index[(index["split"] == "train") & (index["label"] == 1)]


@given(specs)
@settings(max_examples=60, deadline=None)
def test_counts_follow_the_definition_and_the_cap(spec):
    index, noisy, manifest = run(spec)
    for category, kinds in zip(sorted(set(index["category"])), spec["kinds"], strict=True):
        normals, moved = spec["normals"], (train_anomalies(noisy)["category"] == category).sum()
        share = spec["ratio"] if spec["definition"] == "per_normal" else spec["ratio"] / (1 - spec["ratio"])
        room = math.floor(spec["cap"] * sum(kinds))
        assert moved == room if share * normals > room + 0.5 else abs(moved - share * normals) <= 0.5 + 1e-9
        row = manifest[manifest["category"] == category].iloc[0]
        assert (row["normals"], row["available"], row["moved"]) == (normals, sum(kinds), moved)
        assert row["realised_ratio"] == realised_ratio(normals, moved, spec["definition"])
        if moved == row["asked"]:  # nothing ran out: as near as whole images allow
            assert abs(row["realised_ratio"] - spec["ratio"]) <= 0.5 / normals + 1e-9
    assert (manifest["path"] != "").sum() == len(train_anomalies(noisy))


@given(specs)
@settings(max_examples=60, deadline=None)
def test_only_anomalies_move_and_overlap_decides_where_they_are(spec):
    index, noisy, manifest = run(spec)
    injected = set(train_anomalies(noisy)["path"])
    assert injected == set(manifest["path"]) - {""}
    assert injected <= set(index[(index["split"] == "test") & (index["label"] == 1)]["path"])
    test = noisy[noisy["split"] == "test"]
    before = index[index["split"] == "test"]
    assert set(before["path"]) == set(test["path"]) | injected
    assert injected <= set(test["path"]) if spec["overlap"] else not injected & set(test["path"])
    assert not noisy.duplicated(["path", "split"]).any()
    clean = noisy[(noisy["split"] == "train") & (noisy["label"] == 0)]
    assert set(clean["path"]) == set(index[index["split"] == "train"]["path"])
    kept = noisy.drop_duplicates("path").set_index("path")[["mask_path", "category", "label", "defect"]]
    pd.testing.assert_frame_equal(
        kept.sort_index(), index.set_index("path")[["mask_path", "category", "label", "defect"]].sort_index()
    )


@given(specs, st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_a_smaller_ratio_takes_a_part_of_a_larger_one(spec, other):
    low, high = sorted((spec["ratio"], other))
    few, many = (set(run(spec, ratio=r)[2]["path"]) - {""} for r in (low, high))
    assert few <= many


@given(specs)
@settings(max_examples=60, deadline=None)
def test_kinds_of_defect_keep_their_proportions(spec):
    index, noisy, _ = run(spec, cap=1.0)
    for category, kinds in zip(sorted(set(index["category"])), spec["kinds"], strict=True):
        mine = train_anomalies(noisy)
        mine = mine[mine["category"] == category]
        for d, number in enumerate(kinds):
            share = number / sum(kinds)
            assert abs((mine["defect"] == f"kind{d}").sum() - share * len(mine)) <= 1 + share * len(kinds)


def test_proportions_hold_over_seeds():
    index = make_index([100], [(80, 20)])
    counts = [len(train_anomalies(contaminate(index, 0.1, seed)[0]).query("defect == 'kind1'")) for seed in range(200)]
    assert abs(sum(counts) / 200 - 2) < 0.15


def test_seeds_decide_and_nothing_else_does():
    index = make_index([30, 30], [(10, 10), (10, 10)])
    first, same, other = (contaminate(index, 0.2, seed)[1] for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, same)
    assert set(first["path"]) != set(other["path"])
    shuffled = index.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(contaminate(shuffled, 0.2)[1], first)
    alone = contaminate(index[index["category"] == "cat1"], 0.2)[1]
    assert set(alone["path"]) == set(first.query("category == 'cat1'")["path"])


def test_the_result_is_an_index_frame():
    noisy, _ = contaminate(make_index(), 0.2)
    assert list(noisy.columns) == COLUMNS and noisy.attrs["name"] == "made"
    assert list(noisy.index) == list(range(len(noisy)))
    assert noisy["split"].tolist() == sorted(noisy["split"], reverse=True) or noisy["category"].nunique() > 1


def test_a_count_is_per_category_and_runs_out_visibly():
    _, manifest = contaminate(make_index(), 12, definition="count")
    table = realised(manifest)
    assert table["moved"].tolist() == [12, 12, 24] and table["asked"].tolist() == [12, 12, 24]
    _, manifest = contaminate(make_index(), 40, definition="count", cap=0.75)
    table = realised(manifest)
    assert table["asked"].tolist() == [40, 40, 80] and table["moved"].tolist() == [9, 9, 18]
    assert table.loc["all", "per_normal"] == 18 / 32 and table.loc["all", "of_total"] == 18 / 50


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        (10, {"definition": "of_total"}, "write 10 % as 0.1"),
        (-0.1, {}, "0 or more"),
        (math.nan, {}, "0 or more"),
        (0.1, {"definition": "percent"}, "per_normal, of_total, count"),
        (2.5, {"definition": "count"}, "whole number"),
        (0.1, {"cap": 1.5}, "cap 1.5"),
    ],
)
def test_specifications_out_of_range_are_errors(ratio, options, message):
    with pytest.raises(DatasetError, match=message):
        contaminate(make_index(), ratio, **options)


def test_a_contaminated_index_is_not_contaminated_again():
    noisy, manifest = contaminate(make_index(), 0.2)
    with pytest.raises(DatasetError, match="anomalous in train already"):
        contaminate(noisy, 0.1)
    with pytest.raises(DatasetError, match="anomalous in train already"):
        apply_manifest(noisy, manifest)


def test_a_category_without_training_images_is_an_error():
    index = make_index()
    with pytest.raises(DatasetError, match="cat1 has no normal training image"):
        contaminate(index[(index["category"] == "cat0") | (index["split"] == "test")], 0.1)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_manifest_is_loaded_back_and_applied(tmp_path, overlap):
    index = make_index([30, 3], [(10, 10), (2, 1)])
    noisy, manifest = contaminate(index, 0.1, 4, overlap)
    assert (manifest["path"] == "").sum() == 1  # 0.3 images of cat1: none
    save_manifest(manifest, tmp_path / "m.csv", "/data")
    text = (tmp_path / "m.csv").read_text()
    assert "/data" not in text and "cat0/test/kind" in text
    pd.testing.assert_frame_equal(load_manifest(tmp_path / "m.csv", "/data"), manifest)
    pd.testing.assert_frame_equal(apply_manifest(index, load_manifest(tmp_path / "m.csv")), noisy)
    elsewhere = index.assign(path=index["path"].str.replace("/data", "/other/place"))
    moved = apply_manifest(elsewhere, load_manifest(tmp_path / "m.csv"))
    assert moved["path"].str.removeprefix("/other/place").tolist() == noisy["path"].str.removeprefix("/data").tolist()


def test_a_manifest_is_saved_without_a_root_and_not_outside_of_one(tmp_path):
    index = make_index()
    noisy, manifest = contaminate(index, 0.2)
    save_manifest(manifest, tmp_path / "m.csv")
    assert not any(Path(p).is_absolute() for p in load_manifest(tmp_path / "m.csv")["path"])
    pd.testing.assert_frame_equal(apply_manifest(index, load_manifest(tmp_path / "m.csv")), noisy)
    with pytest.raises(DatasetError, match="not below /elsewhere"):
        save_manifest(manifest, tmp_path / "m.csv", "/elsewhere")


def test_a_manifest_of_other_images_is_an_error(tmp_path):
    _, manifest = contaminate(make_index(), 0.2)
    with pytest.raises(DatasetError, match="0 anomalous test images of the index fit"):
        apply_manifest(make_index(kinds=((1,), (1,))), manifest)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match="a manifest has"):
        load_manifest(tmp_path / "other.csv")


def published_lists():
    return [f for root in data_roots() for f in sorted((root / "meds_manifests").glob("train_*_nr*_seed_*.csv"))]


def test_a_published_list_loads_and_applies(tmp_path):
    """MeDS's format: every training image; the VisA lists name files in a converted layout."""
    lines = ["filename,clsname", *(f"cat0/train/good/{i:03}.png,cat0" for i in range(20))]
    lines += ["cat0/test/kind0/002.png,cat0", "cat0/test/kind1/001.png,cat0"]
    (tmp_path / "train_made_nr10_seed_3.csv").write_text("\n".join(lines))
    manifest = load_manifest(tmp_path / "train_made_nr10_seed_3.csv")
    assert list(manifest.columns) == MANIFEST
    assert manifest[["ratio", "seed", "asked", "moved", "normals"]].drop_duplicates().values.tolist() == [
        [0.1, 3, 2, 2, 20]
    ]
    index = make_index()
    noisy = apply_manifest(index, manifest)
    assert sorted(train_anomalies(noisy)["path"]) == ["/data/cat0/test/kind0/002.png", "/data/cat0/test/kind1/001.png"]
    lines = ["filename,class", "cat0/train/good/000.png,cat0", "cat0/test/bad/008.png,cat0"]
    (tmp_path / "train_visa_nr10_seed_0.csv").write_text("\n".join(lines))
    noisy = apply_manifest(index, load_manifest(tmp_path / "train_visa_nr10_seed_0.csv"))
    assert train_anomalies(noisy)["path"].tolist() == ["/data/cat0/test/kind0/008.png"]


@pytest.mark.skipif(not published_lists(), reason="the published lists are not on this disk")
def test_the_published_lists_have_the_counts_that_are_known():
    tables = {file.stem: realised(load_manifest(file)) for file in published_lists()}
    assert len(tables) == 26
    for stem, table in tables.items():
        assert table.index[-1] == "all" and len(table) == (16 if "mvtec" in stem else 13)
    assert tables["train_mvtec_nr0_seed_0"].loc["all", "moved"] == 0
    first = tables["train_mvtec_nr10_seed_0"].loc["all"]
    assert (first["normals"], first["moved"]) == (3629, 371)
    capped = tables["train_mvtec_nr40_seed_0"]
    assert capped.loc["all", "moved"] == 1167 and abs(capped.loc["all", "of_total"] - 0.243) < 5e-4
    assert capped.loc["carpet", "moved"] == 89 < capped.loc["carpet", "asked"]
