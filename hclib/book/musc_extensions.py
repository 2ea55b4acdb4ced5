"""What MuSc's pages add to the plain method: reference images, re-scoring of other methods, turned images."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from hclib.book.experiments import fit_and_score
from hclib.book.musc_experiments import measured, pile_scores
from hclib.book.musc_pools import distance_pool, finished, mutual, pile, pool_scores
from hclib.book.token_tables import CLIP_TOKENS
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.records import config_hash
from hclib.kernels.distances import patch_to_image
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.methods.musc import aggregate, mutual_scores, rescore
from hclib.paths import cache_dir, data_roots

IMAGE = ["auroc", "f1_max", "ap"]
TURNS = ["as they are", "as they are, nearest turn", "turned", "turned, nearest turn"]


def reference_images(config: dict) -> pd.DataFrame:
    """Add k normal reference images to the scoring of one category (Table 15), or score by them alone (Table 16).

    Args:
        config: as for `musc_pools.pile` (its `references` bound k), with `degrees, size, windows`, `shots` (values of
            k) and `seeds` (draws of the references).

    Returns:
        Rows of `measured` with `variant` ("MuSc", "MuSc+"), `shots` (asked for), `used` (there) and `reference_seed`.
    """
    pool = distance_pool(config, config["degrees"])
    tested, index = np.arange(pool.tested), pool.features.index.iloc[: pool.tested]
    available, options = len(pool.features) - pool.tested, {"degrees": config["degrees"], "windows": config["windows"]}
    frames = []
    for shots, seed in product(config["shots"], config["seeds"]):
        if shots == 0 and seed != config["seeds"][0]:
            continue
        chosen = pool.tested + np.random.default_rng(seed).permutation(available)[:shots]
        found = {"MuSc": pool_scores(pool, tested, np.concatenate([tested, chosen]), **options)}
        if shots:
            found["MuSc+"] = pool_scores(pool, tested, chosen, fraction=1.0, strategy="min", **options)
        facts = {"shots": shots, "used": len(chosen), "reference_seed": seed}
        for variant, scores in found.items():
            frames.append(measured(scores, index, config["size"]).assign(variant=variant, **facts))
    return pd.concat(frames, ignore_index=True)


def rescored(config: dict) -> pd.DataFrame:
    """Re-score the image scores of one detector on one category by RsCIN (Tables 5 and 11).

    Args:
        config: `method` "MuSc" (then as for `pile_scores`), "PatchCore" or "HierCore" (then as for `fit_and_score`; the
            latter without a category, its images are re-scored inside their group), with `window_sets`; 0 stands for
            all images.

    Returns:
        One row per category and window set: `category, windows` and the image metrics.
    """
    if config["method"] == "MuSc":
        scores, _, test = pile_scores(config)
    else:
        scores, _, test = fit_and_score(config)
    labels, categories = test.index["label"].to_numpy(), test.index["category"].to_numpy()
    rows = []
    for windows in config["window_sets"]:
        image = by_group(scores.image, np.asarray(test.tokens), scores.group, windows)
        for category in np.unique(categories):
            mine = categories == category
            found = image_metrics(labels[mine], image[mine])
            rows.append({"category": str(category), "windows": name_of(windows), **{m: found[m] for m in IMAGE}})
    return pd.DataFrame(rows)


def neighbour_labels(config: dict) -> pd.DataFrame:
    """Return, for the anomalous images of a category, how many of their nearest neighbours by token are anomalous.

    Args:
        config: as for `musc_pools.pile`.

    Returns:
        One row: `category`, `near` (share among the two nearest), `share` (in the whole category).
    """
    features = pile({**config, "references": 0})
    tokens = torch.nn.functional.normalize(torch.from_numpy(np.asarray(features.tokens, np.float32)), dim=1)
    labels = features.index["label"].to_numpy()
    similar = (tokens @ tokens.T).fill_diagonal_(-torch.inf)
    near = labels[similar.topk(2, dim=1).indices.numpy()]  # (n, 2)
    others = (labels.sum() - 1) / (len(labels) - 1)
    category = str(features.index["category"].iloc[0])
    return pd.DataFrame([{"category": category, "near": near[labels == 1].mean(), "share": others}])


def by_group(image: np.ndarray, tokens: np.ndarray, groups: np.ndarray, windows: list[int]) -> np.ndarray:
    """Re-score image scores inside each group; a window 0 means all images of the group."""
    result = image.copy()
    for group in np.unique(groups):
        mine = groups == group
        sizes = [window or float("inf") for window in windows]
        result[mine] = rescore(image[mine], tokens[mine].astype(np.float32), sizes, minmax=False)
    return result


def name_of(windows: list[int]) -> str:
    """Return a window set as text: "none", "1,2,3", "all"."""
    return "none" if windows == [1] else ",".join(str(window) if window else "all" for window in windows)


def token_scores(config: dict) -> pd.DataFrame:
    """Score a benchmark's test images by their CLIP class tokens alone, inside their class, with and without RsCIN.

    Two scores that know nothing but the tokens of the unlabelled images: the mean distance to the nearest 30 % of the
    others (mutual scoring with one patch per image), and the distance to the nearest one.

    Args:
        config: `dataset` ("MVTec AD" or "VisA") and `window_sets`.

    Returns:
        One row per score, category and window set, as `rescored`.
    """
    tokens, categories, labels = clip_test_set(config["dataset"])
    rows = []
    for strategy, name in (("mean", "mean of the nearest 30 %"), ("min", "nearest image")):
        for category in np.unique(categories):
            mine = categories == category
            image = mutual_scores(torch.from_numpy(tokens[mine])[:, None], strategy=strategy)[:, 0].numpy()
            for windows in config["window_sets"]:
                after = by_group(image, tokens[mine], np.zeros(len(image)), windows)
                found = image_metrics(labels[mine], after)
                facts = {"method": name, "category": str(category), "windows": name_of(windows)}
                rows.append({**facts, **{m: found[m] for m in IMAGE}})
    return pd.DataFrame(rows)


def clip_test_set(dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return CLIP class tokens (N, 768) float32, length 1, categories (N,) and labels (N,) of a benchmark's test set.

    Raises:
        FileNotFoundError: if no data root holds `features/<name>.npz`.
    """
    name = f"features/{CLIP_TOKENS[dataset]}.npz"
    for root in data_roots():
        if (root / name).is_file():
            with np.load(root / name, allow_pickle=False) as stored:
                tokens = stored["tokens"].astype(np.float32)
                tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
                return tokens, stored["category"].astype(str), stored["label"].astype(int)
    raise FileNotFoundError(f"{name} is in none of {[str(r) for r in data_roots()]}: set HCLIB_DATA to its folder")


def turned_images(config: dict) -> pd.DataFrame:
    """Turn every image of a category by a random multiple of 90 degrees and score it again (section A.3).

    The square that the encoder sees is turned, so that no pixel is interpolated and no border appears. "Nearest turn"
    means that an image's distance to another is the smallest over the other's four turns.

    Args:
        config: as for `musc_pools.pile`, with `degrees, size, windows` and `seeds` (draws of the turns).

    Returns:
        Rows of `measured` with `way` (one of `TURNS`) and `turn_seed`.
    """
    upright = pile(config)
    count, index = len(upright), upright.index
    features = _turned(upright, config)  # image i turned k times: row 4 i + k
    layers, degrees = list(features.maps), config["degrees"]
    side = next(iter(features.maps.values())).shape[1]
    turns = [np.random.default_rng(seed).integers(0, 4, count) for seed in config["seeds"]]
    jobs = [(way, config["seeds"][0], np.zeros(count, int)) for way in TURNS[:2]]
    jobs += [(way, seed, drawn) for seed, drawn in zip(config["seeds"], turns, strict=True) for way in TURNS[2:]]
    totals = [np.zeros((count, side, side)) for _ in jobs]
    for layer, degree in product(layers, degrees):
        patches = aggregate(features.maps[layer], degree)
        distances = patch_to_image(patches, patches).numpy().reshape(4 * count, side * side, count, 4)
        for total, (way, _, drawn) in zip(totals, jobs, strict=True):
            part = distances[4 * np.arange(count) + drawn]  # (n, P, n, 4)
            part = part.min(3) if way.endswith("nearest turn") else part[:, :, np.arange(count), drawn]
            scores = mutual(part, np.arange(count), np.arange(count)).reshape(count, side, side)
            total += np.stack([np.rot90(one, -k) for one, k in zip(scores, drawn, strict=True)])
    frames = []
    for total, (way, seed, drawn) in zip(totals, jobs, strict=True):
        patch = (total / (len(layers) * len(degrees))).astype(np.float32)
        scores = finished(patch, features.tokens[4 * np.arange(count) + drawn], config["image_size"], config["windows"])
        frames.append(measured(scores, index, config["size"]).assign(way=way, turn_seed=seed))
    return pd.concat(frames, ignore_index=True)


def _turned(upright: Features, config: dict) -> Features:
    """Encode every image of a pile in its four turns; the turned squares lie in the cache as PNG files."""
    encoder = load_encoder(config["encoder"], config["image_size"], layers=config.get("layers"))
    folder = (
        cache_dir() / "turned" / config_hash({k: config.get(k) for k in ("dataset", "image_size", "images", "draw")})
    )
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, item in enumerate(upright.index.to_dict("records")):
        pixels = encoder.pixels(item["path"]).transpose(1, 2, 0)  # (S, S, 3)
        for k in range(4):
            path = folder / f"{i:04d}-{k}.png"
            if not path.is_file():
                _write_png(path, np.rot90(pixels, k))
            rows.append({**item, "path": str(path)})
    return encoder.extract(pd.DataFrame(rows))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    aside = path.with_suffix(".part")
    Image.fromarray(np.ascontiguousarray(pixels)).save(aside, format="PNG")
    aside.replace(path)
