"""Synthetic anomalies from unlabelled training images: a part of another image, distorted, pasted through a blob."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter, label

from hclib.images import read_image, resize_mask
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.paths import cache_dir

SIZE = 256


def blob(generator: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Draw a connected irregular blob of 1 to 12 % of a square, (size, size) bool."""
    field = gaussian_filter(generator.normal(size=(size, size)), generator.uniform(0.03, 0.1) * size, mode="wrap")
    area = generator.uniform(0.05, 0.12)
    parts, count = label(field > np.quantile(field, 1 - area))
    return parts == 1 + np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:])


def paste(base: np.ndarray, donor: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return `base` with the turned, mirrored and recoloured `donor` inside `mask`, mixed at 50 to 100 %."""
    donor = np.rot90(donor, generator.integers(4))[:: generator.choice([-1, 1])].astype(float)
    donor = donor * generator.uniform(0.6, 1.4) + generator.uniform(-60, 60, size=3)
    if generator.random() < 0.5:
        donor = 255 - donor
    share = mask[:, :, None] * generator.uniform(0.5, 1)
    return np.clip(base * (1 - share) + donor * share, 0, 255).round().astype(np.uint8)


def synthetic_features(train: Features, config: dict) -> tuple[Features, np.ndarray]:
    """Make synthetic anomalies from the (contaminated) training images, encode them, and give their masks.

    FUN-AD's authors make theirs by Perlin noise and textures, "from a noisy (anomaly-present) dataset"; the donors here
    are training images themselves, so that nothing else is needed.

    Args:
        train: contaminated training features.
        config: `synthetic` (share of the training images), `encoder, image_size, layers, seed`.

    Returns:
        Features of the synthetic images, and their masks at the patch grid, (M, h, w) bool.
    """
    count = max(1, round(config["synthetic"] * len(train)))
    names = json.dumps([config["seed"], count, [str(path).rsplit("/", 3)[-3:] for path in train.index["path"]]])
    folder = cache_dir() / "synthetic" / hashlib.sha256(names.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng([config["seed"], 7])
    grid, rows, masks = list(train.maps.values())[-1].shape[1], [], []
    for number in range(count):
        base, donor = (_square(train.index["path"].iloc[int(generator.integers(len(train)))]) for _ in range(2))
        mask = blob(generator)
        file = folder / f"{number:04}.png"
        if not file.is_file():
            aside = file.with_suffix(".part")
            Image.fromarray(paste(base, donor, mask, generator.spawn(1)[0])).save(aside, format="png")
            aside.replace(file)
        else:
            generator.spawn(1)
        masks.append(resize_mask(mask, grid))
        rows.append((file.as_posix(), "", "synthetic", "train", 1, "synthetic"))
    index = pd.DataFrame(rows, columns=["path", "mask_path", "category", "split", "label", "defect"])
    features = load_encoder(config["encoder"], config["image_size"]).extract(index, progress=False)
    if config.get("layers"):
        maps = {name: features.maps[name] for name in config["layers"]}
        features = Features(maps, features.tokens, index, features.encoder)
    return features, np.stack(masks)


def _square(path: str) -> np.ndarray:
    return np.asarray(Image.fromarray(read_image(path)).resize((SIZE, SIZE), Image.Resampling.LANCZOS))
