"""Semantic anomalies: one class is normal, every other class is an anomaly; one feature per image (FUN-AD, Table 6)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from IPython.display import Markdown
from PIL import Image

from hclib.book import report
from hclib.book.experiments import METHODS, dataset_features
from hclib.data.datasets import load_index
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.published import load_published
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.paths import cache_dir, data_roots


def token_features(dataset: str, encoder: str, image_size: int) -> Features:
    """Return one feature per image, its token, as maps of a single patch; normal images of every class only.

    Args:
        dataset: "cifar10" (5,000 decoded test images, `cifar10/cifar10_5k.npz` below a data root; the first 400 of a
            class train) or a data set whose categories are the classes.
        encoder: name for `load_encoder`.
        image_size: side in pixels.
    """
    if dataset == "cifar10":
        features = load_encoder(encoder, image_size).extract(cifar_index())
    else:
        features = dataset_features(dataset, encoder, image_size)
        features = features.subset((features.index["label"] == 0).to_numpy())
    tokens = features.tokens[:, None, None]  # (N, 1, 1, D)
    return Features({"token": tokens}, features.tokens, features.index, features.encoder)


def class_index(dataset: str) -> pd.DataFrame:
    """Return the index of the images of `token_features`, without encoding them."""
    return cifar_index() if dataset == "cifar10" else load_index(dataset).query("label == 0")


def cifar_index(train: int = 400) -> pd.DataFrame:
    """Write the CIFAR-10 sample as PNG files to the cache, once, and list it as an index frame.

    Raises:
        FileNotFoundError: `cifar10/cifar10_5k.npz` is in no data root.
    """
    places = [root / "cifar10" / "cifar10_5k.npz" for root in data_roots()]
    files = [place for place in places if place.is_file()]
    if not files:
        raise FileNotFoundError("cifar10/cifar10_5k.npz is in no data root; set HCLIB_DATA to the folder that holds it")
    with np.load(files[0], allow_pickle=False) as data:
        images, labels, classes = data["images"], data["labels"], data["classes"].tolist()
    folder, rows = cache_dir() / "cifar10", []
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(np.flatnonzero(labels == k)):
            file = folder / name / f"{number:03}.png"
            if not file.is_file():
                Image.fromarray(images[row]).save(file)
            rows.append((file.as_posix(), "", name, "train" if number < train else "test", 0, "good"))
    index = pd.DataFrame(rows, columns=["path", "mask_path", "category", "split", "label", "defect"])
    index.attrs["name"] = "cifar10"
    return index


def one_class_split(features: Features, normal: str, ratio: float, seed: int) -> tuple[Features, Features]:
    """Return training and test features where one class is normal and all others are anomalies.

    Training: the class's training images, and `ratio` times as many of the other classes', drawn by `seed`. Test: all
    test images.
    """
    index = features.index
    mine, train = (index["category"] == normal).to_numpy(), (index["split"] == "train").to_numpy()
    count = round(ratio * (mine & train).sum())
    generator = np.random.default_rng([seed, *normal.encode()])
    others = np.sort(generator.permutation(np.flatnonzero(~mine & train))[:count])
    labelled = Features(features.maps, features.tokens, index.assign(label=(~mine).astype(int)), features.encoder)
    return labelled.subset(np.r_[np.flatnonzero(mine & train), others]), labelled.subset(~train)


def semantic_run(config: dict) -> pd.DataFrame:
    """Return the image AUROC with every class as the normal one, and the spread of normal and other tokens.

    Args:
        config: `dataset, encoder, image_size, method, options, seed, noise_ratio`.

    Returns:
        One row per class and epoch ("last"; "test" for FUN-AD): `auroc`, and `spread`, the mean distance of other
        classes' tokens to their mean over that of the normal class (the method assumes more than 1).
    """
    features = token_features(config["dataset"], config["encoder"], config["image_size"])
    rows = []
    for normal in sorted(features.index["category"].unique()):
        train, test = one_class_split(features, normal, config["noise_ratio"], config["seed"])
        labels = test.index["label"].to_numpy()

        def auroc(scores: object, labels: np.ndarray = labels) -> float:
            return image_metrics(labels, scores.image)["auroc"]

        detector = METHODS[config["method"]](seed=config["seed"], **config["options"])
        extra = {"validation": test, "criterion": auroc} if config["method"] == "FunAD" else {}
        detector.fit(train, **extra)
        spread = [np.linalg.norm(part - part.mean(0), axis=1).mean() for part in _by_label(train)]
        row = {"category": normal, "spread": float(spread[1] / spread[0]), "normal": int((labels == 0).sum())}
        rows.append({**row, "epoch": "last", "auroc": auroc(detector.score(test))})
        if extra:
            rows.append({**row, "epoch": "test", "auroc": auroc(detector.use("test").score(test))})
    return pd.DataFrame(rows)


def _by_label(features: Features) -> list[np.ndarray]:
    labels = features.index["label"].to_numpy()
    return [np.asarray(features.tokens[labels == value], np.float64) for value in (0, 1)]


def semantic_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return AUROC in percent per normal class, a column per method, with the mean and the spread of the tokens."""
    names = results["method"].replace("FunAD", "FUN-AD")
    rows = results.assign(method=names.where(results["epoch"] == "last", names + ", best epoch"))
    table = rows.groupby(["category", "method"])["auroc"].mean().unstack("method") * 100
    table["others' spread / normal's"] = rows.groupby("category")["spread"].mean()
    table.loc["mean"] = table.mean()
    return table.round(2).rename_axis(columns=None)


def beside_table6(table: pd.DataFrame) -> pd.DataFrame:
    """Return our mean AUROC beside the paper's for CIFAR-10, and the difference, in percent and points."""
    paper = load_published("funad", "6").set_index("dataset")["value"]["CIFAR-10"]
    ours = table.loc["mean"].drop("others' spread / normal's")
    return pd.DataFrame({"ours": ours, "paper (FUN-AD, CIFAR-10)": paper, "difference": ours - paper}).round(1)


def semantic_verdict(table: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test whether FUN-AD separates one class from all others, and record it."""
    mean, paper = table.loc["mean"], beside_table6(table)["paper (FUN-AD, CIFAR-10)"].iloc[0]
    return report.claim(
        "funad-semantic",
        "Trained on one class with a few images of the others, FUN-AD tells them apart (mean AUROC of 90 % and more), "
        "and better than the nearest neighbour among the contaminated images.",
        bool(mean["FUN-AD"] >= 90 and mean["FUN-AD"] > mean["PatchCore"]),
        f"Mean image AUROC: FUN-AD {mean['FUN-AD']:.1f} % (best epoch {mean['FUN-AD, best epoch']:.1f} %), nearest "
        f"neighbour {mean['PatchCore']:.1f} %; paper {paper:.1f} % on the whole of CIFAR-10, best epoch "
        f"({base['dataset']}, {base['encoder']} at {base['image_size']} px).",
        source="FUN-AD, supplementary Table 6",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )
