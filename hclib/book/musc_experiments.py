"""The experiments of MuSc's pages: a JSON config in, rows of a Record out (see `hclib.book.experiments.recorded`)."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch

from hclib.book.experiments import METHODS
from hclib.book.musc_pools import CODE, Pool, distance_pool, finished, mutual, pile, pool_scores
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.provenance import peak_memory, source_hash
from hclib.evaluation.records import config_hash
from hclib.evaluation.scenarios import evaluate
from hclib.images import read_masks
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores
from hclib.methods.musc import mutual_scores, rescore
from hclib.paths import cache_dir

METRICS = ["auroc", "ap", "f1_max", "aupro"]
LARGEST = 167  # images of the largest test class of MVTec AD: more are scored in parts (Table 7)
STRATEGIES = {  # Table 4: setting -> upper end of the interval, what is taken of it
    "(a) min": (1.0, "min"),
    "(b) max": (1.0, "max"),
    "(c) mean": (1.0, "mean"),
    "(d) 30 % + min": (0.3, "min"),
    "(e) 30 % + max": (0.3, "max"),
    "(f) 30 % + mean": (0.3, "mean"),
}


def categories_of(dataset: str, wanted: list[str] | None = None) -> list[str]:
    """Return `NAME:CATEGORY` for the categories of a data set, or for those wanted."""
    from hclib.data.datasets import load_index

    names = wanted or sorted(load_index(dataset)["category"].unique())
    return [f"{dataset}:{name}" for name in names]


def drawn(dataset: str, largest: int, complete: Sequence[str] = ()) -> dict:
    """Return `{"images": largest}` for a category with more test images that need not be `complete`; else nothing."""
    from hclib.data.datasets import load_index

    name, _, category = dataset.partition(":")
    split = load_index(name, categories=[category])["split"]
    return {"images": largest} if category not in complete and (split == "test").sum() > largest else {}


def measured(scores: Scores, index: pd.DataFrame, size: int, *, pixel: bool = True) -> pd.DataFrame:
    """Return one row per category and level: `category, level`, the metrics, image counts."""
    rows = evaluate(scores, index, size=size, pixel=pixel).query("category != 'mean'")
    return rows[["category", "level", *METRICS, "n_normal", "n_anomalous"]].reset_index(drop=True)


class ResumedMuSc(METHODS["MuSc"]):
    """MuSc that keeps the scores of every finished layer and degree on disk: an interrupted run goes on from there."""

    def _patch_scores(self, patches: torch.Tensor, references: torch.Tensor | None) -> torch.Tensor:
        content = hashlib.sha256(np.ascontiguousarray(patches.cpu().numpy()).data).hexdigest()[:24]
        facts = {"content": content, "options": self.mutual_options}
        path = cache_dir() / "scores" / f"pass-{config_hash(facts)}-{source_hash(modules=CODE)}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part.npy")
            np.save(aside, super()._patch_scores(patches, references).cpu().numpy())
            aside.replace(path)
        return torch.from_numpy(np.load(path)).to(patches.device)


def pile_scores(config: dict) -> tuple[Scores, float, Features]:
    """Score a pile by MuSc without re-scoring; the scores are cached on disk.

    Args:
        config: as for `musc_pools.pile`, `options` of `MuSc`, `seed`, `known` (whether images are scored inside their
            class). More than `LARGEST` images are scored in equal parts unless `options` name `subsets`.

    Returns:
        Scores without RsCIN, seconds without encoding, and the features of the pile.
    """
    features = pile(config)
    options = {"subsets": math.ceil(len(features) / LARGEST), **config.get("options", {}), "windows": None}
    keys = ("dataset", "encoder", "image_size", "layers", "images", "draw", "seed", "known")
    keys += ("categories",) if "categories" in config else ()
    name = config_hash({k: config.get(k) for k in keys} | {"options": options}) + "-" + source_hash(modules=CODE)
    store = cache_dir() / "scores" / f"musc-{name}"
    if not store.with_suffix(".json").is_file():
        start = time.perf_counter()
        labels = list(features.index["category"]) if config.get("known") else None
        scores = ResumedMuSc(**options, seed=config.get("seed", 0)).score(features, labels)
        store.parent.mkdir(parents=True, exist_ok=True)
        scores.save(store.with_suffix(".safetensors"))
        store.with_suffix(".json").write_text(json.dumps(time.perf_counter() - start))
    seconds = json.loads(store.with_suffix(".json").read_text())
    return Scores.load(store.with_suffix(".safetensors")), seconds, features


def zero_shot(config: dict) -> pd.DataFrame:
    """Return MuSc's metrics on one category, at image level with and without RsCIN.

    Args:
        config: as for `pile_scores`, with `size` and `windows`.

    Returns:
        Rows `image` (with RsCIN), `image without RsCIN` and `pixel`. The image rows have `hits` (see `defect_hits`) and
        all scores: in the order of the pile (`image_scores`) and by label (`normal_scores`, `anomalous_scores`).
    """
    scores, seconds, features = pile_scores(config)
    normal = features.index["label"].to_numpy() == 0
    after = finished(scores.patch, features.tokens, config["image_size"], config["windows"])
    rows = measured(after, features.index, config["size"]).to_dict("records")
    before = measured(scores, features.index, config["size"], pixel=False).assign(level="image without RsCIN")
    rows += before.to_dict("records")
    hits = defect_hits(scores.patch, features.index)
    for row in rows:
        if row["level"] != "pixel":
            row["hits"] = hits
            values = (after if row["level"] == "image" else scores).image
            row |= {"image_scores": values.astype(float).tolist()}
            row |= {"normal_scores": values[normal].astype(float).tolist()}
            row |= {"anomalous_scores": values[~normal].astype(float).tolist()}
    subsets = config.get("options", {}).get("subsets", math.ceil(len(features) / LARGEST))
    return pd.DataFrame(rows).assign(score_seconds=seconds, subsets=subsets)


def defect_hits(patch: np.ndarray, index: pd.DataFrame) -> float:
    """Return the share of anomalous images with a mask whose highest-scoring patch lies in the defect."""
    shown = ((index["label"] == 1) & (index["mask_path"] != "")).to_numpy()
    masks = read_masks(index[shown], patch.shape[1]).reshape(int(shown.sum()), -1)  # (n, P)
    highest = patch[shown].reshape(len(masks), -1).argmax(1)
    return float(masks[np.arange(len(masks)), highest].mean())


def examples(config: dict) -> pd.DataFrame:
    """Return patch scores of a few images of one category: anomalous ones from weakest to strongest, then normal ones.

    Args:
        config: as for `zero_shot`, with `count` anomalous and `normals` normal images.

    Returns:
        One row per image: `row` (in the pile), `label`, `defect`, `image_score`, `patch` (flattened).
    """
    scores, _, features = pile_scores(config)
    after = finished(scores.patch, features.tokens, config["image_size"], config["windows"])
    labels = features.index["label"].to_numpy()
    rows = []
    for label, count in ((1, config["count"]), (0, config["normals"])):
        mine = np.flatnonzero(labels == label)
        ranked = mine[np.argsort(after.image[mine], kind="stable")]
        for row in ranked[np.linspace(0, len(ranked) - 1, count).round().astype(int)]:
            values = [round(float(v), 4) for v in after.patch[row].ravel()]
            facts = {"row": int(row), "label": label, "defect": features.index["defect"].iloc[row]}
            rows.append({**facts, "image_score": float(after.image[row]), "patch": values})
    return pd.DataFrame(rows)


def mixed_pile(config: dict) -> pd.DataFrame:
    """Score a pile of several products: all together, inside FINCH clusters, inside the true classes.

    Args:
        config: as for `pile_scores` without a category, with `size` and `windows`; `fraction` of the last way of
            scoring all together.

    Returns:
        One row per way of scoring and category, with `groups` and `score_seconds`; rows "pooled" have the AUROC over
        all images, one scale for all.
    """
    small = config["fraction"]
    ways = {
        "one pile": ({}, False),
        f"one pile, nearest {small:.0%}": ({"fraction": small}, False),
        "FINCH clusters": ({"groups": "finch"}, False),
        "true classes": ({}, True),
    }
    frames = []
    for way, (options, known) in ways.items():
        options = {**config.get("options", {}), **options, "subsets": 1}
        scores, seconds, features = pile_scores({**config, "options": options, "known": known})
        image, labels = scores.image.copy(), features.index["label"].to_numpy()
        for group in np.unique(scores.group):
            mine = scores.group == group
            image[mine] = rescore(
                image[mine], features.tokens[mine].astype(np.float32), config["windows"], minmax=False
            )
        final = Scores(scores.patch, image, scores.group, sigma=0.0, align_corners=True)
        rows = measured(final, features.index, config["size"])
        pooled = {"category": "pooled", "level": "image", "auroc": image_metrics(labels, image)["auroc"]}
        rows = pd.concat([rows, pd.DataFrame([pooled])], ignore_index=True)
        frames.append(rows.assign(way=way, groups=len(np.unique(scores.group)), score_seconds=seconds))
    return pd.concat(frames, ignore_index=True)


def ablation(config: dict) -> pd.DataFrame:
    """Vary one part of MuSc at a time on one category: degrees, strategy, interval, share, windows, layers.

    Args:
        config: as for `musc_pools.pile`, with `size`, `degree_sets` (lists of degrees), `degrees` (the default),
            `lowers` (lower ends of the interval), `fractions` (upper ends), `window_sets` and `windows` (the default).

    Returns:
        Rows of `measured` with `part` and `value` (the varied parameter, as text).
    """
    degrees = sorted({degree for chosen in config["degree_sets"] for degree in chosen})
    pool = distance_pool(config, degrees)
    every, index = np.arange(pool.tested), pool.features.index.iloc[: pool.tested]
    frames = []
    for part, value, pixel, options in _variants(config, pool):
        options = {"windows": config["windows"], **options}
        scores = pool_scores(pool, every, every, **options)
        frames.append(measured(scores, index, config["size"], pixel=pixel).assign(part=part, value=value))
    return pd.concat(frames, ignore_index=True)


def _variants(config: dict, pool: Pool) -> Iterator[tuple[str, str, bool, dict]]:
    """Yield what is varied, its value as text, whether pixels are measured, and the options of `pool_scores`."""
    for degrees in config["degree_sets"]:
        yield "degrees", "{" + ",".join(map(str, degrees)) + "}", True, {"degrees": degrees}
    usual = {"degrees": config["degrees"]}
    for setting, (fraction, strategy) in STRATEGIES.items():
        yield "strategy", setting, True, {**usual, "fraction": fraction, "strategy": strategy}
    for lower in config["lowers"]:
        yield "interval", f"{lower:.0%}~30%", True, {**usual, "lower": lower}
    for fraction in config["fractions"]:
        yield "fraction", f"{fraction:.0%}", True, {**usual, "fraction": fraction}
    for windows in config["window_sets"]:
        value = "none" if windows == [1] else ",".join("all" if w == 0 else str(w) for w in windows)
        yield "windows", value, False, {**usual, "windows": [w or math.inf for w in windows]}
    for layer in pool.layers:
        yield "layer", layer, True, {**usual, "layers": [layer]}


def parts_of(count: int, parts: int, seed: int) -> list[np.ndarray]:
    """Divide `count` images at random into `parts` of nearly equal size, without looking at labels."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[start::parts]) for start in range(parts)]


def pile_sizes(config: dict) -> pd.DataFrame:
    """Score one category in ever smaller parts (Table 7, and how few images suffice).

    Args:
        config: as for `musc_pools.pile`, with `degrees, size, windows`, `subsets` (numbers of parts), `sizes` (images
            per part; those that give at least two parts are used), `seeds`.

    Returns:
        Rows of `measured` with `subsets`, `wanted` (size), `largest_part`, `smallest_part`, `division_seed` and `kind`:
        "subsets" sees all images in RsCIN, as the paper does, "alone" only those of the part.
    """
    pool = distance_pool(config, config["degrees"])
    index, frames = pool.features.index.iloc[: pool.tested], []
    jobs = [("subsets", number, None) for number in config["subsets"]]
    jobs += [("alone", pool.tested // size, size) for size in config["sizes"] if 2 * size <= pool.tested]
    for (kind, number, wanted), seed in product(jobs, config["seeds"]):
        parts = parts_of(pool.tested, number, seed)
        if min(map(len, parts)) < 5 or (number == 1 and seed != config["seeds"][0]):
            continue
        windows = config["windows"] if kind == "alone" else None
        found = [pool_scores(pool, part, part, degrees=config["degrees"], windows=windows) for part in parts]
        order = np.argsort(np.concatenate(parts))
        patch, image = (np.concatenate([getattr(f, name) for f in found])[order] for name in ("patch", "image"))
        scores = Scores(patch, image, np.full(len(image), -1), sigma=0.0, align_corners=True)
        if kind == "subsets":
            scores = finished(patch, pool.features.tokens[: pool.tested], config["image_size"], config["windows"])
        sizes = {"largest_part": max(map(len, parts)), "smallest_part": min(map(len, parts))}
        rows = measured(scores, index, config["size"], pixel=kind == "subsets")
        frames.append(rows.assign(kind=kind, subsets=number, wanted=wanted, division_seed=seed, **sizes))
    return pd.concat(frames, ignore_index=True)


def anomaly_shares(config: dict) -> pd.DataFrame:
    """Score random piles of one size with ever more anomalous images among them.

    Args:
        config: as for `musc_pools.pile`, with `degrees, windows`, `pile_size`, `shares`, `draws`, `seed`. Normal images
            are drawn from the test and the training images of the pool.

    Returns:
        One row per share and draw: `share` (realised), `anomalous`, `auroc` (image), `patch_auroc` (over patches).
    """
    pool = distance_pool(config, config["degrees"])
    labels = pool.features.index["label"].to_numpy()
    masked = np.zeros((len(labels), *_grid(pool)), bool)
    masked[: pool.tested] = pool.masked(_grid(pool)[0])
    rng, rows = np.random.default_rng(config["seed"]), []
    for share, draw in product(config["shares"], range(config["draws"])):
        anomalous = max(1, round(config["pile_size"] * share))
        kinds = ((1, anomalous), (0, config["pile_size"] - anomalous))
        pools = [np.flatnonzero(labels == label) for label, _ in kinds]
        if any(len(mine) < count for mine, (_, count) in zip(pools, kinds, strict=True)):
            continue
        chosen = [rng.permutation(mine)[:count] for mine, (_, count) in zip(pools, kinds, strict=True)]
        chosen = np.sort(np.concatenate(chosen))
        scores = pool_scores(pool, chosen, chosen, degrees=config["degrees"], windows=config["windows"])
        row = {"share": anomalous / config["pile_size"], "nominal_share": share, "draw_number": draw}
        row |= {"anomalous": anomalous, "auroc": image_metrics(labels[chosen], scores.image)["auroc"]}
        row["patch_auroc"] = image_metrics(masked[chosen].ravel(), scores.patch.ravel())["auroc"]
        rows.append(row)
    return pd.DataFrame(rows)


def _grid(pool: Pool) -> tuple[int, int]:
    side = round(next(iter(pool.distances.values())).shape[1] ** 0.5)
    return side, side


def timings(config: dict) -> pd.DataFrame:
    """Measure the mutual scoring of random patches: one layer, one degree, one thread.

    Args:
        config: `images, patches, channels, subsets, seed`, and `way`: "mutual_scores", or "each against all"
            (`torch.cdist` from one image at a time to all others; 10 of the images are measured and scaled up).

    Returns:
        One row: `cpu_seconds` (what neighbours on a shared machine take does not count), `extra_mb` (peak memory above
        what was resident before), `features_mb` (the patches themselves).
    """
    generator = torch.Generator().manual_seed(config["seed"])
    shape = (config["images"], config["patches"], config["channels"])
    patches = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=2)
    parts = [patches[part] for part in parts_of(len(patches), config["subsets"], config["seed"])]
    work, scale = mutual_scores, 1.0
    if config["way"] == "each against all":
        work, scale = _each_against_all, len(patches) / len(parts) / min(10, len(parts[0]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work(patches[:6])  # libraries take their own memory once
        _return_free_memory()
        with peak_memory() as before:
            pass
        with peak_memory() as peak:
            start = time.process_time()
            for part in parts:
                work(part)
            seconds = (time.process_time() - start) * scale
    finally:
        torch.set_num_threads(threads)
    extra = peak["peak_mb"] - before["peak_mb"]
    return pd.DataFrame([{"cpu_seconds": seconds, "extra_mb": extra, "features_mb": patches.nbytes / 1e6}])


def _return_free_memory() -> None:
    """Make glibc give freed blocks back at once, so that none of an earlier call is reused unseen."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
        libc.malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _each_against_all(patches: torch.Tensor) -> None:
    """Score up to 10 images, each by all others at once."""
    for i in range(min(10, len(patches))):
        others = torch.cat([patches[:i], patches[i + 1 :]]).flatten(0, 1)  # ((N - 1) P, C)
        least = torch.cdist(patches[i], others).view(patches.shape[1], -1, patches.shape[1]).amin(2)
        least.topk(max(1, int((len(patches) - 1) * 0.3)), dim=1, largest=False).values.mean(1)


def patch_histograms(config: dict) -> pd.DataFrame:
    """Return Figure 4's histograms on one category: of the distances to all images, and of their averages.

    Args:
        config: as for `musc_pools.pile`, with `layer, degree, bins`.

    Returns:
        One row per `quantity` ("distances", "mean of all", "mean of the nearest 30 %") and `kind` of patch (normal,
        anomalous): `edges` and `counts`, and for the averages `patch_auroc` and the `overlap` of the densities.
    """
    degree = config["degree"]
    pool = distance_pool(config, [degree])
    every, masked = np.arange(pool.tested), pool.masked(_grid(pool)[0]).reshape(pool.tested, -1)  # (n, P)
    distances = pool.distances[config["layer"], degree]
    tested = np.array(distances[: pool.tested, :, : pool.tested])
    tested[every, :, every] = np.nan
    quantities = {"distances": tested, "mean of all": mutual(distances, every, every, fraction=1.0)}
    quantities["mean of the nearest 30 %"] = mutual(distances, every, every)
    rows = []
    for quantity, values in quantities.items():
        kinds = {"normal": values[~masked].ravel(), "anomalous": values[masked].ravel()}
        kinds = {kind: v[np.isfinite(v)] for kind, v in kinds.items()}
        edges = np.linspace(0, max(np.quantile(v, 0.999) for v in kinds.values()), config["bins"] + 1)
        counts = {kind: np.histogram(np.clip(v, 0, edges[-1]), edges)[0] for kind, v in kinds.items()}
        shared = np.minimum(*(c / max(1, c.sum()) for c in counts.values())).sum()
        facts = {"quantity": quantity, "edges": edges.tolist(), "overlap": shared}
        if quantity != "distances":
            facts["patch_auroc"] = image_metrics(masked.ravel(), values.ravel())["auroc"]
        rows += [{**facts, "kind": kind, "counts": c.tolist()} for kind, c in counts.items()]
    return pd.DataFrame(rows)
