"""Piles of unlabelled images for MuSc's pages, and their patch-to-image distances, computed once and cached.

Whatever MuSc's ablations change (degrees, layers, interval, subsets, reference images, who is in the pile) only selects
among the same numbers: how far patch p of image i is from image j, per layer and degree. A `Pool` holds them; `mutual`
reads any variant of Eq. 2 out of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from filelock import FileLock

from hclib.data.datasets import load_index
from hclib.evaluation.provenance import source_hash
from hclib.evaluation.records import config_hash
from hclib.kernels.distances import patch_to_image
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.methods.musc import aggregate, rescore
from hclib.paths import cache_dir

CODE = ("hclib.methods.musc", "hclib.kernels.distances", "hclib.kernels.encoders")


def pile(config: dict) -> Features:
    """Return the features of a pile: some test images of every category, then some normal training images.

    Args:
        config: `dataset` (`NAME` or `NAME:CATEGORY`; with `categories`, only these), `encoder`, `image_size`; `layers`
            where not the default ones;
            `images` and `references`, the most test and training images to draw per category (absent: all test
            images, no training image); `draw`, the seed of that (absent: 0).
    """
    name, _, category = config["dataset"].partition(":")
    index = load_index(name, categories=[category] if category else config.get("categories"))
    rng, rows = np.random.default_rng(config.get("draw", 0)), {"test": [], "train": []}
    for _, members in index.groupby("category"):
        for part, most in (("test", config.get("images")), ("train", config.get("references", 0))):
            mine = members.index[members["split"] == part].to_numpy()
            order = rng.permutation(mine)
            rows[part].append(np.sort(order[: len(mine) if most is None else most]))
    chosen = index.iloc[np.concatenate([*rows["test"], *rows["train"]])].reset_index(drop=True)
    layers = config.get("layers")
    return load_encoder(config["encoder"], config["image_size"], layers=layers).extract(chosen)


@dataclass(frozen=True)
class Pool:
    """The images of a pile and all distances among them.

    Attributes:
        features: of n images, the `tested` test images first.
        tested: how many are test images; the rest are normal training images.
        distances: (layer, degree) -> (n, P, n) float32, memory-mapped: L2 from a patch to an image.
    """

    features: Features
    tested: int
    distances: dict[tuple[str, int], np.ndarray]

    @property
    def layers(self) -> list[str]:
        """Return the layers whose distances are here."""
        return list(dict.fromkeys(layer for layer, _ in self.distances))

    def masked(self, size: int) -> np.ndarray:
        """Return which patches of the test images are anomalous, (tested, size, size) bool."""
        from hclib.images import read_masks

        return read_masks(self.features.index.iloc[: self.tested], size)


def distance_pool(config: dict, degrees: Sequence[int]) -> Pool:
    """Return the pool of a config, its distances from the cache where they are there already.

    Args:
        config: as for `pile`; what else it holds does not matter.
        degrees: of LNAMD.
    """
    features = pile(config)
    keys = ("dataset", "categories", "encoder", "image_size", "images", "references", "draw")
    place, code = {k: config.get(k) for k in keys}, source_hash(modules=CODE)
    folder = cache_dir() / "distances"
    folder.mkdir(exist_ok=True)
    found = {}
    for layer, maps in features.maps.items():
        for degree in degrees:
            path = folder / f"{config_hash({**place, 'layer': layer, 'degree': degree})}-{code}.npy"
            with FileLock(f"{path}.lock"):
                if not path.is_file():
                    patches = aggregate(maps, degree)  # (n, P, C)
                    aside = path.with_suffix(".part.npy")
                    np.save(aside, patch_to_image(patches, patches).numpy())
                    aside.replace(path)
            found[layer, degree] = np.load(path, mmap_mode="r")
    tested = int((features.index["split"] == "test").sum())
    return Pool(features, tested, found)


def mutual(
    distances: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    fraction: float = 0.3,
    lower: float = 0.0,
    strategy: str = "mean",
) -> np.ndarray:
    """Score the patches of some images by others: `hclib.methods.musc.mutual_scores`, read from known distances.

    Args:
        distances: (n, P, n) of a pool.
        rows: images to score.
        columns: images that score, all of `rows` among them or none; an image does not score itself.
        fraction: upper end of the interval of nearest images.
        lower: lower end of it.
        strategy: "mean", "min" or "max" of the interval.

    Returns:
        (len(rows), P) float32.

    Raises:
        ValueError: the interval of nearest images is empty.
    """
    part = torch.from_numpy(np.array(distances[rows][:, :, columns]))  # (r, P, c)
    own = torch.from_numpy(np.asarray(rows)[:, None] == np.asarray(columns))
    part.masked_fill_(own[:, None, :], torch.inf)
    others = len(columns) - int(own.any())
    low, high = int(others * lower), int(others * fraction)
    if low >= high:
        raise ValueError(f"the interval {lower:g} to {fraction:g} of {others} images is empty; give more images")
    kept = part.topk(high, dim=2, largest=False).values[:, :, low:]
    return {"mean": torch.mean, "min": torch.amin, "max": torch.amax}[strategy](kept, dim=2).numpy()


def pool_scores(
    pool: Pool,
    rows: np.ndarray,
    columns: np.ndarray,
    *,
    layers: Iterable[str] | None = None,
    degrees: Iterable[int] = (1, 3, 5),
    windows: Sequence[float] | None = (1, 2, 3),
    **interval: float | str,
) -> Scores:
    """Return MuSc's scores of some images of a pool by others of it: Eq. 3, maximum of the map, RsCIN over `rows`."""
    side = round(next(iter(pool.distances.values())).shape[1] ** 0.5)
    chosen = [(layer, degree) for layer in (layers or pool.layers) for degree in degrees]
    total = sum(mutual(pool.distances[key], rows, columns, **interval).astype(np.float64) for key in chosen)
    patch = (total / len(chosen)).astype(np.float32).reshape(len(rows), side, side)
    return finished(patch, pool.features.tokens[rows], pool.features.encoder["image_size"], windows)


def finished(patch: np.ndarray, tokens: np.ndarray, size: int, windows: Sequence[float] | None) -> Scores:
    """Turn patch scores (n, h, w) into `Scores` as `MuSc` does: maximum of the map, then RsCIN where it is wanted."""
    image = image_scores(patch, "map_max", size=size, align_corners=True)
    if windows:
        image = rescore(image, np.asarray(tokens, np.float32), windows, minmax=False)
    return Scores(patch, image, np.full(len(patch), -1), sigma=0.0, align_corners=True)
