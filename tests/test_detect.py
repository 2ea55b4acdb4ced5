"""`hclib detect` on a fabricated folder of two products: files written, decisions, and what bad input does."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hclib.cli import main


def _write(path, colour, rng, defect=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.clip(np.asarray(colour) + rng.normal(0, 6, (96, 96, 3)), 0, 255).astype(np.uint8)
    image[::12] //= 2  # some structure
    if defect:
        image[40:60, 30:62] = 255 - np.asarray(colour, np.uint8)
    Image.fromarray(image).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top, rng = tmp_path_factory.mktemp("factory"), np.random.default_rng(0)
    for i in range(20):
        _write(top / "train" / f"red{i}.png", (190, 60, 50), rng)
        _write(top / "train" / "more" / f"blue{i}.JPG", (40, 80, 200), rng)
    for i in range(4):
        _write(top / "test" / "good" / f"red{i}.png", (190, 60, 50), rng)
        _write(top / "test" / "good" / f"blue{i}.png", (40, 80, 200), rng)
        _write(top / "test" / "stain" / f"red{i}.png", (190, 60, 50), rng, defect=True)
        _write(top / "test" / "stain" / f"blue{i}.png", (40, 80, 200), rng, defect=True)
    return top


def detect(folders, out, *options):
    common = ["--encoder", "efficientnet_lite0", "--image-size", "96", "--out", str(out)]
    return main(["detect", str(folders / "train"), str(folders / "test"), *common, *options])


@pytest.mark.slow
def test_detect_writes_scores_maps_and_a_report_that_needs_no_network(folders, tmp_path, capsys):
    out = tmp_path / "result"
    assert detect(folders, out) == 0
    table = pd.read_csv(out / "scores.csv")
    assert list(table.columns) == ["path", "score", "group", "threshold", "decision"]
    assert len(table) == 16
    assert (table["decision"] == np.where(table["score"] >= table["threshold"], "anomalous", "normal")).all()
    stained = table["path"].str.startswith("stain/")
    assert (table.loc[stained, "decision"] == "anomalous").all()
    assert table.loc[~stained, "score"].max() < table.loc[stained, "score"].min()
    assert set(table["group"]) == {0, 1}
    assert sum(1 for p in (out / "heatmaps").rglob("*.jpg") if p.stat().st_size > 500) == 16
    page = (out / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 16
    assert str(folders) not in page
    assert (out / "detector" / "detector.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["result"]  # nothing left aside
    assert "8 of 16 images anomalous" in capsys.readouterr().out


@pytest.mark.slow
def test_detect_repeats_itself_and_replaces_only_when_told(folders, tmp_path, capsys):
    out = tmp_path / "result"
    assert detect(folders, out, "--method", "patchcore", "--seed", "5") == 0
    first = (out / "scores.csv").read_bytes()
    assert detect(folders, out, "--method", "patchcore", "--seed", "5") == 2
    assert "not empty" in capsys.readouterr().err
    assert detect(folders, out, "--method", "patchcore", "--seed", "5", "--overwrite") == 0
    assert (out / "scores.csv").read_bytes() == first


def test_bad_folders_and_options_say_what_is_wrong(folders, tmp_path, capsys):
    cases = [
        (["detect", str(tmp_path / "none"), str(folders / "test"), "--out", str(tmp_path / "o")], "is not a folder"),
        (["detect", str(tmp_path), str(folders / "test"), "--out", str(tmp_path / "o")], "holds no image"),
        (
            ["detect", str(folders / "train"), str(folders / "test"), "--out", str(tmp_path / "o"), "--holdout", "1"],
            "holdout=1",
        ),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_unreadable_images_are_all_named_before_any_work(folders, tmp_path, capsys):
    bad = tmp_path / "test"
    _write(bad / "fine.png", (1, 2, 3), np.random.default_rng(0))
    (bad / "cut.png").write_bytes((bad / "fine.png").read_bytes()[:200])
    (bad / "empty.jpg").write_bytes(b"")
    assert main(["detect", str(folders / "train"), str(bad), "--out", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert "2 images cannot be read" in message and "cut.png" in message and "empty.jpg" in message
    assert "--skip-unreadable" in message
    assert not (tmp_path / "o").exists()


def test_too_few_training_images(folders, tmp_path, capsys):
    few = tmp_path / "few"
    for i in range(3):
        _write(few / f"{i}.png", (9, 9, 9), np.random.default_rng(i))
    assert main(["detect", str(few), str(folders / "test"), "--out", str(tmp_path / "o")]) == 2
    assert "at least 10" in capsys.readouterr().err
