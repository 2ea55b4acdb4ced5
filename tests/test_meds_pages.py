"""The MeDS chapter's experiments: Theorem 1's weight and gap against their definitions, limits, tables, the sheet."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from hclib.book import meds_experiments, meds_figures, meds_tables
from hclib.kernels.features import Features
from hclib.methods.meds import bootstrap_limit


def planted(count=16, bad=4, seed=0, grid=4):
    """One category on the demo set's name: smooth patches; in the first images one foreign patch, which is masked."""
    rng = np.random.default_rng(seed)
    maps = (rng.normal(size=(count, grid, grid, 6)) * 0.3 + [4, 1, 0, 0, 0, 0]).astype(np.float16)
    maps[:bad, 1, 2] = rng.normal(size=(bad, 6)).astype(np.float16) * 3
    label = (np.arange(count) < bad).astype(int)
    index = pd.DataFrame({"path": [f"{i}.png" for i in range(count)], "mask_path": "", "category": "a"})
    index = index.assign(split="train", label=label, defect=np.where(label == 1, "foreign", "good"))
    return Features({"block9": maps}, rng.normal(size=(count, 6)).astype(np.float32), index, {"name": "fake"})


@pytest.fixture
def sets(monkeypatch):
    train, test = planted(), planted(10, 3, seed=1)
    truth = np.zeros((16, 4, 4), bool)
    truth[:4, 1, 2] = True
    found = [("a", train, test, {0.1: np.r_[0, 4:16], 0.3: np.arange(16)})]
    monkeypatch.setattr(meds_experiments, "category_sets", lambda config: found)
    monkeypatch.setattr(meds_experiments, "patch_truth", lambda part: truth[: len(part)])
    return train, truth


def test_the_weight_peaks_where_the_theorem_says_and_draws_agree():
    for share in (0.01, 0.1):
        sizes = np.linspace(1, 1000, 200_001)
        assert sizes[meds_experiments.omega(sizes, share).argmax()] == pytest.approx(
            meds_experiments.best_size(share), rel=1e-2
        )
        few = [1, 5, 20]
        drawn = meds_experiments.simulated_omega(share, few, 200_000, 0)
        np.testing.assert_allclose(drawn, meds_experiments.omega(np.array(few), share), rtol=0.08)


def test_low_pass_gives_the_limit_for_every_noise_and_ratio(sets):
    train, truth = sets
    config = {"ratios": [0.1, 0.5], "memories": 20, "seed": 0}
    rows = meds_experiments.low_pass(config)
    assert len(rows) == 4 and rows["anomalous"].tolist() == [1, 1, 4, 4] and (rows["normal"] == 12).all()
    patches = meds_experiments.memory_patches(train, np.arange(16), ["block9"])
    distances = meds_experiments.patch_to_image(patches, patches).square() / 2
    limit = bootstrap_limit(distances, 0.5).view(16, 4, 4).numpy()
    last = rows.iloc[3]
    assert last["mean_normal"] == pytest.approx(limit[~truth].mean(), rel=1e-4)
    assert last["mean_anomalous"] == pytest.approx(limit[truth].mean(), rel=1e-4)
    assert (rows["patch_auroc"] > 0.9).all() and (rows["drawn_auroc"] > 0.8).all() and rows["test_auroc"].notna().all()
    table = meds_tables.separation_table(rows)
    assert list(table.columns) == ["10 %", "50 %"] and len(table) == 8
    assert meds_tables.beside_memory_row(rows.assign(noise=0.1), 0.1).loc["10 %", "paper"] == 97.5
    plt.close(meds_figures.separation_curves(rows))


def test_the_gap_is_that_of_drawn_memories(sets):
    rows = meds_experiments.expected_gap({"noises": [0.3], "queries": 50, "points": 6, "seed": 0})
    train, truth = sets
    points = meds_experiments.memory_patches(train, np.arange(16), ["block9"]).flatten(0, 1)
    rng, size = np.random.default_rng(3), int(rows["size"].iloc[3])
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf).numpy()
    # the definition: memories of m other patches, drawn with replacement
    normal = rng.choice(np.flatnonzero(~truth.ravel()), 60)
    found = {}
    for name, queries in (("normal", normal), ("anomalous", np.flatnonzero(truth.ravel()))):
        near = [np.delete(distances[q], q)[rng.integers(255, size=(400, size))].min(1).mean() for q in queries]
        found[name] = np.mean(near)
    assert rows["gap"].iloc[3] == pytest.approx(found["anomalous"] - found["normal"], rel=0.1)
    assert (rows["gap"] > 0).all() and (rows["gap"] >= rows["first_order"] - 1e-2).all()
    assert 0 <= rows["dominated"].iloc[0] <= 1 and len(meds_tables.gap_table(rows)) == 1
    plt.close(meds_figures.gap_curves(rows))


def test_more_memories_come_closer_to_the_limit(sets):
    config = {"noises": [0.3], "ratio": 0.2, "ensembles": [2, 50], "draws": 2}
    rows = meds_experiments.limit_agreement(config)
    means = rows.groupby(["replacement", "memories"])["mean_error"].mean().unstack()
    assert (means[50] < 0.5 * means[2]).all()
    assert meds_tables.agreement_table(rows).shape == (4, 5)
    plt.close(meds_figures.agreement_curves(rows))


def test_the_sheet_for_review_leaves_out_what_may_not_be_shown(tmp_path, monkeypatch):
    review = planted().index.assign(excess=np.arange(16.0)[::-1], rank=np.arange(101, 117))
    figure = meds_figures.review_sheet(review, count=5, columns=4)
    assert figure.get_supxlabel() == "left out (licence): a" and not any(ax.images for ax in figure.axes)
    plt.close(figure)
    monkeypatch.setattr(meds_figures, "may_publish", lambda index: index["label"].to_numpy() == 1)
    monkeypatch.setattr(meds_figures, "_square", lambda path, size: np.zeros((size, size, 3), np.uint8))
    figure = meds_figures.review_sheet(review[::-1], count=3, columns=4)
    assert [ax.get_title() for ax in figure.axes] == ["104: 12.0", "103: 13.0", "102: 14.0", ""]
    plt.close(figure)
