"""`hclib bench`: the fast paths agree with the plain ones, and its table says so."""

import pytest

from hclib.book.bench import bench
from hclib.cli import main


def test_fast_and_plain_agree():
    table = bench(2000, 16, 0.05, "cpu").set_index("kernel")
    assert list(table.index) == ["greedy_coreset", "nearest, k = 1", "patch_to_image", "mutual_scores"]
    assert table.loc["greedy_coreset", "difference"] == 0
    assert (table["difference"] < 5e-3).all() and (table["seconds"] > 0).all()


def test_bad_sizes_are_refused(capsys):
    assert main(["bench", "--points", "10"]) == 2
    assert "at least 2000 points" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ratio=1"):
        bench(5000, 8, 1.0)
