"""Every layout gives the same kind of index frame; what is wrong with a data set is said by file."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hclib.data import datasets, layouts
from hclib.data.datasets import (
    DatasetError,
    audit,
    check,
    list_datasets,
    load_index,
    locate,
    may_publish,
    published_counts,
)
from hclib.images import read_masks
from hclib.paths import data_roots

COLUMNS = ["path", "mask_path", "category", "split", "label", "defect"]


def shared(*parts):
    for root in data_roots():
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    pytest.skip(f"{'/'.join(parts)} is in none of the data roots (set HCLIB_DATA)")


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def picture(path, seed=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)


def tree(root, category="bottle", good="good", bad="crack", mask="{}_mask.png", suffix=".png"):
    """One category of empty files: two training images, one good and two bad test images, two masks."""
    return touch(
        root,
        *(f"{category}/train/{good}/00{n}{suffix}" for n in (1, 0)),
        f"{category}/test/{good}/000{suffix}",
        *(f"{category}/test/{bad}/00{n}{suffix}" for n in (0, 1)),
        *(f"{category}/ground_truth/{bad}/{mask.format(f'00{n}')}" for n in (0, 1)),
    )


def summary(index):
    return list(index[["category", "split", "label", "defect"]].itertuples(index=False, name=None))


def assert_is_index(index, name):
    assert list(index.columns) == COLUMNS and index.attrs["name"] == name
    assert index["label"].dtype == np.int64
    assert list(index.index) == list(range(len(index)))
    assert ((index["label"] == 0) == (index["defect"] == "good")).all()
    for path in (*index["path"], *(m for m in index["mask_path"] if m)):
        assert path.startswith("/")
    keys = [(r.category, r.split != "train", r.defect != "good", r.defect, r.path) for r in index.itertuples()]
    assert keys == sorted(keys)


ONE_CATEGORY = [("train", 0, "good")] * 2 + [("test", 0, "good")] + [("test", 1, "crack")] * 2


@pytest.mark.parametrize("name, category", [("mvtec", "bottle"), ("mpdd", "connector")])
def test_mvtec_and_mpdd(tmp_path, name, category):
    tree(tmp_path / name, category)
    touch(tmp_path / name, "license.txt", f"{category}/train/good/.hidden.png", f"{category}/readme.txt")
    index = load_index(name, tmp_path)
    assert_is_index(index, name)
    assert summary(index) == [(category, *row) for row in ONE_CATEGORY]
    assert [p.rsplit("/", 1)[1] for p in index["path"]] == [
        "000.png",
        "001.png",
        "000.png",
        "000.png",
        "001.png",
    ]
    assert list(index["mask_path"][:3]) == ["", "", ""]
    assert index["mask_path"][4].endswith(f"{category}/ground_truth/crack/001_mask.png")
    pd.testing.assert_frame_equal(index, load_index(name, tmp_path / name))


def test_btad(tmp_path):
    root = tmp_path / "BTech_Dataset_transformed"
    tree(root, "01", "ok", "ko", "{}.png", ".bmp")
    tree(root, "02", "ok", "ko", "{}.png", ".png")
    tree(root, "03", "ok", "ko", "{}.bmp", ".bmp")
    touch(root, "03/ground_truth/ok/000.bmp")
    index = load_index("btad", tmp_path)
    assert_is_index(index, "btad")
    rows = [(split, label, "ko" if label else "good") for split, label, _ in ONE_CATEGORY]
    assert summary(index) == [(category, *row) for category in ("01", "02", "03") for row in rows]
    assert index["mask_path"].str[-4:].unique().tolist() == ["", ".png", ".bmp"]


def write_visa(root, table):
    (root / "split_csv").mkdir(parents=True)
    table.to_csv(root / "split_csv" / "1cls.csv", index=False)
    touch(root, *table["image"], *table["mask"][table["mask"] != ""])


def test_visa(tmp_path):
    rows = [("candle", "train", "normal", f"candle/Data/Images/Normal/000{n}.JPG", "") for n in (1, 0)]
    rows.append(("candle", "test", "normal", "candle/Data/Images/Normal/0002.JPG", ""))
    rows.append(
        (
            "candle",
            "test",
            "anomaly",
            "candle/Data/Images/Anomaly/000.JPG",
            "candle/Data/Masks/Anomaly/000.png",
        )
    )
    write_visa(tmp_path / "VisA", pd.DataFrame(rows, columns=["object", "split", "label", "image", "mask"]))
    index = load_index("visa", tmp_path)
    assert_is_index(index, "visa")
    assert [row[1:] for row in summary(index)] == [*ONE_CATEGORY[:3], ("test", 1, "anomaly")]
    assert index["mask_path"][3].endswith("VisA/candle/Data/Masks/Anomaly/000.png")
    (tmp_path / "VisA" / rows[0][3]).unlink()
    with pytest.raises(DatasetError, match=r"0001\.JPG: no such file, although .*1cls\.csv lists it"):
        load_index("visa", tmp_path)


@pytest.mark.parametrize("folder", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
def test_realiad(tmp_path, folder):
    def item(kind, name, mask=None):
        return {"category": "audiojack", "anomaly_class": kind, "image_path": name, "mask_path": mask}

    split = {
        "meta": {"prefix": "audiojack/", "normal_class": "OK", "pre_transform": []},
        "train": [item("OK", f"OK/S000{n}/audiojack_000{n}_OK_C1.jpg") for n in (1, 0)],
        "test": [item("OK", "OK/S0002/a.jpg"), item("AK", "NG/AK/S0003/b.jpg", "NG/AK/S0003/b.png")],
    }
    root = tmp_path / "Real-IAD"
    (root / folder).mkdir(parents=True)
    (root / folder / "audiojack.json").write_text(json.dumps(split))
    with pytest.raises(DatasetError, match="no realiad_1024"):
        load_index("realiad", tmp_path)
    images = [row["image_path"] for part in ("train", "test") for row in split[part]]
    touch(root / "realiad_1024" / "audiojack", *images, "NG/AK/S0003/b.png")
    index = load_index("realiad", tmp_path)
    assert_is_index(index, "realiad")
    assert [row[1:] for row in summary(index)] == [*ONE_CATEGORY[:3], ("test", 1, "AK")]
    assert index["mask_path"][3].endswith("realiad_1024/audiojack/NG/AK/S0003/b.png")
    del split["meta"]
    (root / folder / "audiojack.json").write_text(json.dumps(split))
    with pytest.raises(DatasetError, match=r"audiojack\.json: not a Real-IAD split"):
        load_index("realiad", tmp_path)


def mtd_tree(root, normal=11):
    for kind in layouts.MTD_DEFECTS:
        touch(root, f"MT_{kind}/Imgs/exp1_num_1.jpg", f"MT_{kind}/Imgs/exp1_num_1.png")
    names = [f"MT_Free/Imgs/exp1_num_{n}" for n in range(normal)]
    return touch(root, *(f"{name}{suffix}" for name in names for suffix in (".jpg", ".png")))


def test_mtd_splits_its_normal_images_by_seed(tmp_path):
    mtd_tree(tmp_path / "mtd")
    index = load_index("mtd", tmp_path)
    assert_is_index(index, "mtd")
    assert index["defect"].value_counts().to_dict() == {"good": 11} | {k.lower(): 1 for k in layouts.MTD_DEFECTS}
    assert ((index["split"] == "test") & (index["label"] == 0)).sum() == 3  # a fifth, rounded up
    assert not index["path"].str.endswith(".png").any()
    pd.testing.assert_frame_equal(index, load_index("mtd", tmp_path, seed=0))
    others = [load_index("mtd", tmp_path, seed=seed) for seed in range(1, 6)]
    assert any(not index.equals(other) for other in others)
    assert all(set(index["path"]) == set(other["path"]) for other in others)
    (tmp_path / "mtd/MT_Crack/Imgs/exp1_num_1.png").unlink()
    with pytest.raises(DatasetError, match=r"MT_Crack/Imgs/exp1_num_1\.jpg: .*no mask"):
        load_index("mtd", tmp_path)


def test_folder_of_many_categories_of_one_and_as_a_path(tmp_path):
    tree(tmp_path / "many", "b")
    tree(tmp_path / "many", "a", mask="{}.bmp")
    touch(tmp_path / "many", "notes/todo.txt")
    index = load_index("folder", tmp_path / "many")
    assert_is_index(index, "folder")
    assert summary(index) == [(category, *row) for category in "ab" for row in ONE_CATEGORY]
    pd.testing.assert_frame_equal(index, load_index(str(tmp_path / "many")))
    one = load_index("folder", tmp_path / "many" / "b")
    pd.testing.assert_frame_equal(one, load_index("folder", tmp_path / "many", categories=["b"]))


def test_folder_without_masks_or_training_part(tmp_path):
    touch(tmp_path, "train/x.png", "test/bad/y.png", "test/good/y.png")
    index = load_index("folder", tmp_path)
    assert [row[1:] for row in summary(index)] == [
        ("train", 0, "good"),
        ("test", 0, "good"),
        ("test", 1, "bad"),
    ]
    assert (index["mask_path"] == "").all()
    (tmp_path / "train/x.png").unlink()
    assert len(load_index("folder", tmp_path)) == 2  # zero-shot methods need no training images
    touch(tmp_path, "test/z.png")
    with pytest.raises(DatasetError, match=r"z\.png: a test image outside a defect folder"):
        load_index("folder", tmp_path)


def test_one_missing_mask_is_an_error(tmp_path):
    (tree(tmp_path) / "bottle/ground_truth/crack/001_mask.png").unlink()
    for name in ("mvtec", "folder"):
        with pytest.raises(DatasetError, match=r"crack/001\.png: .*no mask; expected .*crack/001_mask\.png"):
            load_index(name, tmp_path)


def csv(file, **changes):
    row = {
        "path": "a.png",
        "mask_path": "",
        "category": "01",
        "split": "test",
        "label": "0",
        "defect": "good",
    }
    pd.DataFrame([row | {"path": "b.png"}, row | changes]).to_csv(file, index=False)
    touch(file.parent, "a.png", "b.png", "m.png")
    return str(file)


def test_csv(tmp_path):
    index = load_index(csv(tmp_path / "mine.csv", label="1", defect="dent", mask_path="m.png"))
    assert_is_index(index, "mine.csv")
    assert index["category"].tolist() == ["01", "01"]
    assert index["mask_path"][1] == (tmp_path / "m.png").as_posix()
    (tmp_path / "elsewhere").mkdir()
    moved = csv(tmp_path / "elsewhere" / "mine.csv", path=str(tmp_path / "a.png"))
    assert load_index(moved, tmp_path)["path"].tolist() == [f"{tmp_path}/a.png", f"{tmp_path}/b.png"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": "1"}, "line 3: .*defect 'good'"),
        ({"defect": "dent"}, "line 3: .*label '0'"),
        ({"label": "yes"}, "line 3: .*'yes'"),
        ({"split": "val"}, "line 3: split 'val'"),
        ({"path": "absent.png"}, "absent.png: no such file, although .*mine.csv lists it"),
        ({"mask_path": "absent.png"}, "absent.png: no such file"),
        ({"path": "b.png"}, "b.png: listed more than once"),
    ],
)
def test_bad_csv_rows_are_named(tmp_path, changes, message):
    with pytest.raises(DatasetError, match=message):
        load_index(csv(tmp_path / "mine.csv", **changes))


def test_bad_csv_files(tmp_path):
    (tmp_path / "mine.csv").write_text("path,label\na.png,0\n")
    with pytest.raises(DatasetError, match=r"no column mask_path, category, split, defect"):
        load_index(str(tmp_path / "mine.csv"))
    (tmp_path / "mine.csv").write_text("")
    with pytest.raises(DatasetError, match="cannot be read as CSV"):
        load_index(str(tmp_path / "mine.csv"))
    with pytest.raises(FileNotFoundError, match="none.csv"):
        load_index(str(tmp_path / "none.csv"))


def test_missing_data_names_the_roots_and_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HCLIB_DATA", f"{tmp_path}/one:{tmp_path}/two")
    with pytest.raises(FileNotFoundError) as error:
        load_index("mvtec")
    for part in ("mvtec", f"{tmp_path}/one", f"{tmp_path}/two", "`hclib data get mvtec`", "HCLIB_DATA"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/three"):
        load_index("mtd", tmp_path / "three")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_index("folder", tmp_path / "three")
    with pytest.raises(DatasetError, match="root="):
        load_index("folder")
    with pytest.raises(DatasetError, match="'mvtek' is no data set"):
        load_index("mvtek")


def test_data_are_found_below_a_root_of_the_environment(tmp_path, monkeypatch):
    tree(tmp_path / "mvtec_anomaly_detection")
    monkeypatch.setenv("HCLIB_DATA", str(tmp_path))
    assert locate("mvtec") == tmp_path / "mvtec_anomaly_detection"
    assert len(load_index("mvtec")) == 5
    table = list_datasets().set_index("name")
    assert table.loc["mvtec", "found"] and table.loc["mvtec", "where"] == str(tmp_path / "mvtec_anomaly_detection")
    assert not table.loc["realiad", "found"] and table.loc["realiad", "where"].startswith("https://")
    assert {"demo", "mtd", "realmix", "visa", "mpdd", "btad", "folder"} <= set(table.index)


def test_empty_categories(tmp_path):
    touch(tmp_path / "mvtec", "bottle/train/good/readme.txt")
    with pytest.raises(DatasetError, match="bottle: the category is empty"):
        load_index("mvtec", tmp_path)
    tree(tmp_path / "many", "a")
    (tmp_path / "many" / "b").mkdir()
    with pytest.raises(DatasetError, match="b: the category is empty"):
        load_index("folder", tmp_path / "many")
    touch(tmp_path / "half", "bottle/train/good/0.png")
    with pytest.raises(DatasetError, match="no test images of bottle"):
        load_index("mvtec", tmp_path / "half")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DatasetError, match="nothing: no image found"):
        load_index("folder", tmp_path / "nothing")


def test_categories_are_selected_and_checked(tmp_path):
    tree(tmp_path, "bottle")
    tree(tmp_path, "cable")
    assert load_index("mvtec", tmp_path, categories=["cable"])["category"].unique().tolist() == ["cable"]
    with pytest.raises(DatasetError, match="no category bottel; there are bottle, cable"):
        load_index("mvtec", tmp_path, categories=["bottel"])


def test_anomalous_training_images_must_be_allowed(tmp_path):
    touch(tree(tmp_path), "bottle/train/crack/007.png")
    with pytest.raises(DatasetError, match=r"train/crack/007\.png: an anomalous image in train.*allow_contaminated"):
        load_index("mvtec", tmp_path)
    index = load_index("mvtec", tmp_path, allow_contaminated=True)
    assert_is_index(index, "mvtec")
    assert summary(index)[2] == ("bottle", "train", 1, "crack")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 30)), min_size=1, unique=True), st.randoms())
def test_row_order_does_not_depend_on_the_list(tmp_path_factory, images, random):
    root = tmp_path_factory.mktemp("order")
    rows = [
        (
            f"{n}{'.png' if n % 2 else '.jpg'}",
            "",
            c,
            "train" if n < 10 else "test",
            int(n > 20),
            "x" if n > 20 else "good",
        )
        for c, n in images
    ]
    rows = [(f"{c}{path}", *rest) for (path, *rest), (c, _) in zip(rows, images, strict=True)]
    touch(root, *(row[0] for row in rows))
    frames = []
    for _ in range(2):
        random.shuffle(rows)
        pd.DataFrame(rows, columns=COLUMNS).to_csv(root / "list.csv", index=False)
        frames.append(load_index(str(root / "list.csv")))
    assert_is_index(frames[0], "list.csv")
    pd.testing.assert_frame_equal(*frames)


def test_pixels_may_be_shown_only_where_the_terms_say_so():
    index = pd.DataFrame({"category": ["screw", "cookie", "hazelnut_toy", "ball_screw", "glassfiber", "magnetic_tile"]})
    assert not may_publish(index).any()
    for name, allowed in [
        ("realmix", [0, 1, 1, 1, 0, 0]),
        ("demo", [1] * 6),
        ("mtd", [0] * 6),
        ("mvtec", [0] * 6),
    ]:
        index.attrs["name"] = name
        assert may_publish(index).tolist() == [bool(a) for a in allowed]


def full_mvtec(root):
    """Write MVTec AD as empty files, from MeDS's list of training images and MuSc's test features."""
    train = pd.read_csv(shared("meds_manifests", "train_mvtec_nr0_seed_0.csv"))["filename"]
    test = np.load(shared("features", "mvtec_clip_vitl14_336.npz"), allow_pickle=False)
    touch(root, *train)
    for number, (category, defect, label) in enumerate(
        zip(test["category"], test["defect"], test["label"], strict=True)
    ):
        touch(root, f"{category}/test/{defect}/{number:04}.png")
        if label:
            touch(root, f"{category}/ground_truth/{defect}/{number:04}_mask.png")


def test_published_lists_of_mvtec_have_the_counts_of_table_2(tmp_path):
    full_mvtec(tmp_path / "mvtec")
    report = check("mvtec", tmp_path)
    assert len(report) == 4 * 15 and (report["problem"] == "").all()
    totals = report.groupby("count")[["published", "found"]].sum()
    assert totals.loc["train_normal"].tolist() == [3629, 3629]
    assert totals.loc["test_normal"].tolist() == [467, 467]
    assert totals.loc["test_abnormal"].tolist() == [1258, 1258]
    touch(tmp_path / "mvtec", "screw/train/good/999.png", "tile/train/crack/999.png")
    (tmp_path / "mvtec/wood/train/good/000.png").unlink()
    wrong = check("mvtec", tmp_path).query("problem != ''")
    assert list(wrong[["category", "count", "published", "found", "problem"]].itertuples(index=False, name=None)) == [
        ("screw", "train_normal", 320, 321, "1 too many"),
        ("wood", "train_normal", 247, 246, "1 too few"),
        ("tile", "train_abnormal", 0, 1, "1 too many"),
    ]


def test_official_split_of_visa_has_the_counts_of_table_2(tmp_path):
    table = pd.read_csv(shared("meds_manifests", "visa_1cls.csv"), keep_default_na=False)
    write_visa(tmp_path / "visa", table)
    report = check("visa", tmp_path)
    assert len(report) == 3 * 12 and (report["problem"] == "").all()
    assert report.groupby("count")["found"].sum().to_dict() == {
        "train_normal": 8659,
        "test_normal": 962,
        "test_abnormal": 1200,
    }


def test_missing_categories_are_reported_and_unknown_counts_refused(tmp_path):
    tree(tmp_path / "btad", "01", "ok", "ko")
    report = check("btad", tmp_path).set_index(["category", "count"])
    assert report.loc[("03", "train_normal"), "problem"] == "1000 too few"
    assert report.loc[("01", "anomaly_class"), "problem"] == ""
    for name in ("realiad", "folder", "demo"):
        with pytest.raises(DatasetError, match="no published image counts"):
            check(name)
    assert published_counts("mpdd")["train_normal_count"].sum() == 888


def test_mtd_and_realmix_here():
    shared("realmix.csv")
    index, tiles = load_index("realmix"), load_index("mtd")
    assert_is_index(index, "realmix")
    assert len(index) == 2680 and index["category"].nunique() == 6
    assert tiles["split"].value_counts().to_dict() == {"train": 761, "test": 583}
    # the split of seed 0 is the one that realmix.csv lists
    pd.testing.assert_frame_equal(index[index["category"] == "magnetic_tile"].reset_index(drop=True), tiles)
    for name in ("mtd", "realmix"):
        assert (check(name)["problem"] == "").all()
    assert may_publish(index).sum() == 600 + 77 + 51


@pytest.mark.slow
def test_masks_of_realmix():
    shared("realmix.csv")
    index = load_index("realmix")
    test = index[index["split"] == "test"]
    masks = read_masks(test, 224)
    assert masks.shape == (1194, 224, 224)
    empty = test[(test["label"] == 1) & ~masks.any(axis=(1, 2))]
    assert len(empty) == 4 and (empty["defect"] == "uneven").all()
    assert not masks[(test["label"] == 0).to_numpy()].any()


@pytest.mark.slow
def test_audit_of_realmix_finds_the_four_empty_masks():
    shared("realmix.csv")
    problems = audit(load_index("realmix"))
    assert len(problems) == 4
    assert problems["problem"].str.contains("is empty").all() and (problems["category"] == "magnetic_tile").all()


def audited(tmp_path):
    for number, path in enumerate(["train/good/0", "train/good/1", "test/good/0", "test/crack/0", "test/crack/1"]):
        picture(tmp_path / "bottle" / f"{path}.png", number)
    for name in "01":
        Image.fromarray(np.eye(6, 4, dtype=bool)).save(
            (folder := tmp_path / "bottle/ground_truth/crack").mkdir(parents=True, exist_ok=True)
            or folder / f"{name}_mask.png"
        )
    return tmp_path


def test_audit_of_a_sound_set_is_empty(tmp_path):
    for quick in (False, True):
        report = audit(load_index("mvtec", audited(tmp_path)), quick=quick)
        assert list(report.columns) == ["path", "category", "problem"] and report.empty


@pytest.mark.parametrize(
    "harm, where, message, quick",
    [
        (lambda root: (root / "train/good/1.png").write_bytes(b""), "train/good/1.png", "0 bytes", True),
        (lambda root: (root / "test/good/0.png").write_text("x"), "test/good/0.png", "cannot be read", True),
        (lambda root: picture(root / "test/good/0.png", 0), "train/good/0.png", "in train and test", False),
        (lambda root: picture(root / "train/good/1.png", 0), "train/good/1.png", "both in train", False),
        (
            lambda root: picture(root / "test/crack/0.png", 2),
            "test/crack/0.png",
            "normal and anomalous",
            False,
        ),
        (
            lambda root: picture(root / "ground_truth/crack/0_mask.png", size=(9, 9)),
            "test/crack/0.png",
            "9 x 9",
            False,
        ),
        (
            lambda root: Image.new("L", (4, 6)).save(root / "ground_truth/crack/0_mask.png"),
            "test/crack/0.png",
            "empty",
            False,
        ),
        (
            lambda root: picture(root / "train/crack/0.png", 9),
            "train/crack/0.png",
            "anomalous (crack) in train",
            False,
        ),
    ],
)
def test_audit_names_what_is_wrong(tmp_path, harm, where, message, quick):
    harm(audited(tmp_path) / "bottle")
    index = load_index("mvtec", tmp_path, allow_contaminated=True)
    report = audit(index)
    assert len(report) == 1 and report["category"].tolist() == ["bottle"]
    assert message in report["problem"][0]
    assert where in report["path"][0] + report["problem"][0]
    assert len(audit(index, quick=True)) == quick


def test_audit_of_files_that_are_gone(tmp_path):
    index = load_index("mvtec", audited(tmp_path))
    (tmp_path / "bottle/test/good/0.png").unlink()
    (tmp_path / "bottle/ground_truth/crack/0_mask.png").unlink()
    assert audit(index)["problem"].str.contains("no such file").tolist() == [True, True]


def test_data_room_does_not_import_torch():
    code = "import sys, hclib.data.datasets, hclib.data.download; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_is_an_index_like_the_others(tmp_path, monkeypatch):
    folder = tree(tmp_path / "drawn", "brick")
    load_index("folder", folder).to_csv(folder / "index.csv", index=False)
    monkeypatch.setattr("hclib.data.demo.render_demo", lambda root, seed: folder)
    assert_is_index(load_index("demo"), "demo")
    assert may_publish(load_index("demo")).all()
    assert datasets.DatasetError is layouts.DatasetError
