"""The experiments of the MeDS chapter: a JSON config in, rows of a Record out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from hclib.book.experiments import draw_per_category
from hclib.book.noise_experiments import noisy_features, patch_truth
from hclib.evaluation.metrics import image_metrics
from hclib.kernels.distances import patch_to_image
from hclib.kernels.features import Features
from hclib.methods.meds import bootstrap_limit, bootstrap_scores, robust_maximum
from hclib.methods.meds_memory import limit_weights, memory_layers, memory_patches


def omega(size: np.ndarray, inside: float) -> np.ndarray:
    """Return the weight m * (1 - pi)^(m - 1) of Theorem 1 for memory sizes m and a share pi of features in reach."""
    return size * (1 - inside) ** (size - 1)


def best_size(inside: float) -> float:
    """Return the memory size -1 / ln(1 - pi) at which `omega` is largest (Theorem 1)."""
    return -1 / np.log1p(-inside)


def simulated_omega(inside: float, sizes: list[int], memories: int, seed: int) -> np.ndarray:
    """Estimate `omega` by drawing: the chance that exactly one of m draws lies in reach, over pi.

    m * pi * (1 - pi)^(m - 1) is that chance, so omega is what one more feature in reach is worth to a memory.
    """
    rng = np.random.default_rng(seed)
    hits = [(rng.binomial(size, inside, memories) == 1).mean() for size in sizes]
    return np.array(hits) / inside


def category_sets(config: dict) -> list[tuple[str, Features, Features, dict[float, np.ndarray]]]:
    """Return, per category, training features at the largest ratio, test features, and the training rows by ratio.

    The anomalies of a smaller ratio are among those of a larger one, so one tensor of distances serves all ratios.

    Args:
        config: as for `noisy_features`, with `noises` (ratios) and `train_images` kept per category before anomalies
            are injected (0 for all), drawn by `seed`; `test_images` likewise of the test images (0 by default).
    """
    noise = {"definition": "per_normal", "overlap": True, "seed": config["seed"]}
    paths = {}
    for ratio in sorted(config["noises"]):
        train, test, _ = noisy_features({**config, "noise": {**noise, "ratio": ratio}})
        paths[ratio] = train.index["path"]
    normal = train.subset((train.index["label"] == 0).to_numpy())
    if config["train_images"]:
        normal = draw_per_category(normal, config["train_images"], config["seed"])
    if config.get("test_images"):
        test = draw_per_category(test, config["test_images"], config["seed"])
    kept, result = set(normal.index["path"]), []
    for name in config["categories"] or sorted(train.index["category"].unique()):
        mine = (train.index["category"] == name) & (train.index["path"].isin(kept) | (train.index["label"] == 1))
        part = train.subset(mine.to_numpy())
        rows = {ratio: np.flatnonzero(part.index["path"].isin(found)) for ratio, found in paths.items()}
        if config["train_images"]:  # as many anomalies as the ratio asks for of the images that are left
            rows = {ratio: _thin(part, found, ratio, config["seed"]) for ratio, found in rows.items()}
        result.append((name, part, test.subset((test.index["category"] == name).to_numpy()), rows))
    return result


def _thin(part: Features, rows: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    bad = part.index["label"].to_numpy() == 1
    normal, drawn = rows[~bad[rows]], np.random.default_rng(seed).permutation(np.flatnonzero(bad))
    return np.sort(np.concatenate([normal, drawn[np.isin(drawn, rows)][: round(ratio * len(normal))]]))


def low_pass(config: dict) -> pd.DataFrame:
    """Return how well memories of every sampling ratio separate (Figures 2 and 3), in the limit of many memories.

    Args:
        config: as for `category_sets`, with `memory_layers`, `ratios` and `memories`, a number that is really drawn.

    Returns:
        One row per category, `noise` and `ratio`: of the training patches AUROC (`patch_auroc`; `drawn_auroc` with
        `memories` drawn ones instead of the limit) and the mean, 10 and
        90 % quantiles of normal and anomalous scores; of training and test images AUROC (`train_auroc`, `test_auroc`);
        counts. Scores are 1 - cos.
    """
    found = []
    for name, train, test, by_noise in category_sets(config):
        layers = memory_layers(train, config.get("memory_layers"))
        patches = memory_patches(train, np.arange(len(train)), layers)
        queries = memory_patches(test, np.arange(len(test)), layers)
        inside, across = patch_to_image(patches, patches), patch_to_image(queries, patches)
        truth = torch.from_numpy(patch_truth(train).reshape(len(train), -1))
        labels, test_labels = train.index["label"].to_numpy(), test.index["label"].to_numpy()
        for noise, rows in by_noise.items():
            weights = torch.stack([limit_weights(len(rows), ratio) for ratio in config["ratios"]], 1).float()
            kept = torch.from_numpy(rows)
            own = _weighted(inside[kept][:, :, kept], weights)  # (n, P, ratios)
            other = _weighted(across[:, :, kept], weights)
            cosine = (inside[kept][:, :, kept]).square_().mul_(0.5)
            for k, ratio in enumerate(config["ratios"]):
                row = {"category": name, "noise": noise, "ratio": ratio, "anomalous": int(labels[rows].sum())}
                row |= {"normal": len(rows) - row["anomalous"]}
                row |= _separation(own[..., k], truth[kept])
                drawn = bootstrap_scores(cosine, ratio, config["memories"], config["seed"])
                row["drawn_auroc"] = _auroc(truth[kept].flatten().numpy(), drawn.flatten())
                row["train_auroc"] = _auroc(labels[rows], robust_maximum(own[..., k]))
                row["test_auroc"] = _auroc(test_labels, robust_maximum(other[..., k]))
                found.append(row)
    return pd.DataFrame(found)


def _weighted(distances: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return expected 1 - cos (n, P, R) of distances (n, P, N) under limit weights (N, R)."""
    return torch.cat([(part.square() / 2).sort(dim=2).values @ weights for part in distances.split(16)])


def _separation(scores: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    row = {"patch_auroc": _auroc(truth.flatten().numpy(), scores.flatten())}
    for name, part in (("normal", scores[~truth]), ("anomalous", scores[truth])):
        values = part.double().numpy()
        low, high = np.quantile(values, [0.1, 0.9]) if len(values) else (np.nan, np.nan)
        row |= {f"mean_{name}": float(values.mean()) if len(values) else np.nan}
        row |= {f"low_{name}": float(low), f"high_{name}": float(high)}
    return row


def _auroc(labels: np.ndarray, scores: torch.Tensor) -> float:
    return image_metrics(labels, scores.numpy())["auroc"] if 0 < labels.sum() < len(labels) else np.nan


def limit_agreement(config: dict) -> pd.DataFrame:
    """Return how far B bootstrapped memories are from infinitely many, on the training patches of every category.

    Args:
        config: as for `category_sets`, with `memory_layers`, `ratio`, `ensembles` (several B) and `draws` per B.

    Returns:
        One row per category, `replacement`, B and draw: mean and largest absolute difference of patch scores, relative
        to the mean score of the limit; and the AUROC of training images under both.
    """
    found, noise = [], max(config["noises"])
    for name, train, _, by_noise in category_sets(config):
        patches = memory_patches(train, by_noise[noise], memory_layers(train, config.get("memory_layers")))
        distances = patch_to_image(patches, patches).square_().mul_(0.5)
        labels = train.index["label"].to_numpy()[by_noise[noise]]
        for replacement in (True, False):
            limit = bootstrap_limit(distances, config["ratio"], replacement=replacement)
            auroc = _auroc(labels, robust_maximum(limit))
            for count in config["ensembles"]:
                for draw in range(config["draws"]):
                    scores = bootstrap_scores(distances, config["ratio"], count, draw, replacement=replacement)
                    error = (scores - limit).abs() / limit.mean()
                    row = {"category": name, "replacement": replacement, "memories": count, "draw": draw}
                    row |= {"mean_error": float(error.mean()), "largest_error": float(error.max())}
                    found.append({**row, "auroc": _auroc(labels, robust_maximum(scores)), "limit_auroc": auroc})
    return pd.DataFrame(found)


def expected_gap(config: dict) -> pd.DataFrame:
    """Return Theorem 1 on real patches: the expected gap, its first-order part, and how often its condition holds.

    Queries are patches of the contaminated training set, normal and anomalous; the features are all its patches but the
    query itself. Memories are drawn patch by patch with replacement, as the theorem has it.

    Args:
        config: as for `category_sets`, with `memory_layers`, `queries` of either kind and `points` of the curves.

    Returns:
        One row per category and memory size: `gap` and `first_order` (means over all pairs of queries, L2 of
        normalised patches), `positive` (share of pairs with a gap above 0); and per category `dominated`, the share of
        pairs that meet the condition (delta >= 0 at all radii).
    """
    found, noise = [], max(config["noises"])
    for name, train, _, by_noise in category_sets(config):
        part = train.subset(by_noise[noise])
        points = memory_patches(part, np.arange(len(part)), memory_layers(part, config.get("memory_layers"))).flatten(
            0, 1
        )
        truth, rng = patch_truth(part).ravel(), np.random.default_rng(config["seed"])
        picks = [rng.permutation(np.flatnonzero(truth == flag))[: config["queries"]] for flag in (False, True)]
        normal, anomalous = (_others(points, torch.from_numpy(pick)) for pick in picks)  # (Q, N - 1) ascending
        radii = torch.linspace(0, float(max(normal.max(), anomalous.max())), 400)
        inside = [_inside(d, radii) for d in (normal, anomalous)]  # (Q, radii): pi(q, r)
        dominated = _dominated(*inside)
        count = normal.shape[1]
        for size in np.unique(np.geomspace(1, count, config["points"]).round().astype(int)):
            left = torch.arange(count, -1, -1, dtype=torch.float64) / count
            weights = left[:-1] ** int(size) - left[1:] ** int(size)
            near, far = normal.double() @ weights, anomalous.double() @ weights
            weight = int(size) * (1 - inside[0]) ** (int(size) - 1)
            first = (inside[0] * weight).mean(0) - weight.mean(0) * inside[1].mean(0)
            row = {"category": name, "size": int(size), "share": float(size / count), "dominated": dominated}
            row |= {
                "gap": float(far.mean() - near.mean()),
                "first_order": float(torch.trapezoid(first, radii.double())),
            }
            found.append({**row, "positive": float((far[:, None] > near).double().mean())})
    return pd.DataFrame(found)


def _others(points: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """Return ascending L2 distances (Q, N - 1) of some points to all others."""
    distances = torch.cdist(points[picks], points, compute_mode="donot_use_mm_for_euclid_dist")
    distances[torch.arange(len(picks)), picks] = -1
    return distances.sort(dim=1).values[:, 1:].contiguous()


def _inside(ascending: torch.Tensor, radii: torch.Tensor) -> torch.Tensor:
    """Return the share of features within each radius, (Q, radii) float64."""
    found = torch.searchsorted(ascending, radii.expand(len(ascending), -1).contiguous(), right=True)
    return found.double() / ascending.shape[1]


def _dominated(normal: torch.Tensor, anomalous: torch.Tensor) -> float:
    """Return the share of pairs for which the normal query has at least as many features in reach at every radius."""
    hits = [float((row >= anomalous).all(1).double().mean()) for row in normal]
    return float(np.mean(hits))
