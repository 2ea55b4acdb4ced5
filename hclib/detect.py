"""`hclib detect`: normal images in, scores, decisions, heat maps and one report out. No labels, no notebook."""

from __future__ import annotations

import base64
import html
import io
import shutil
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from hclib.data.datasets import audit
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.thresholds import normal_thresholds
from hclib.images import IMAGE_SUFFIXES, read_image
from hclib.kernels.encoders import load_encoder
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores
from hclib.methods import HierCore, PatchCore

METHODS = {"hiercore": HierCore, "patchcore": PatchCore}
FEWEST = 10  # training images below which memory banks and thresholds mean nothing
THUMBNAIL = 176


class DetectError(ValueError):
    """The folders or options given to `hclib detect` cannot be used."""


def list_images(folder: Path) -> list[Path]:
    """Return the images below `folder` in sorted order.

    Raises:
        DetectError: if the folder does not exist or holds no image.
    """
    if not folder.is_dir():
        raise DetectError(f"{folder} is not a folder: give a folder of images (sub-folders are searched too)")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise DetectError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _index(train: list[Path], test: list[Path]) -> pd.DataFrame:
    rows = [(str(p), "", "images", split, 0, "") for split, files in (("train", train), ("test", test)) for p in files]
    return pd.DataFrame(rows, columns=["path", "mask_path", "category", "split", "label", "defect"])


def _readable(index: pd.DataFrame, skip: bool) -> pd.DataFrame:
    problems = audit(index, quick=True)
    bad = index["path"].isin(problems["path"])
    if bad.any() and not skip:
        listed = "\n  ".join(f"{p.path}: {p.problem}" for p in problems.head(10).itertuples())
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DetectError(
            f"{bad.sum()} images cannot be read:\n  {listed}{more}\nMend or remove them, or pass --skip-unreadable."
        )
    return index[~bad].reset_index(drop=True)


def hold_out(count: int, share: float, seed: int) -> np.ndarray:
    """Return which of `count` training images are kept out of the bank to set thresholds: `(count,)` bool."""
    held = np.zeros(count, bool)
    held[np.random.default_rng(seed).permutation(count)[: max(1, round(count * share))]] = True
    return held


def detect(
    train_dir: str | Path,
    test_dir: str | Path,
    out: str | Path,
    *,
    method: str = "hiercore",
    clustering: str = "hdbscan",
    encoder: str = "dinov2_vits14",
    image_size: int = 224,
    ratio: float = 0.1,
    holdout: float = 0.2,
    quantile: float | None = None,
    seed: int = 0,
    device: str = "auto",
    skip_unreadable: bool = False,
    overwrite: bool = False,
    report_images: int = 200,
) -> pd.DataFrame:
    """Score every image below `test_dir` against the normal images below `train_dir` and write the results to `out`.

    A share of the normal images is held out of the memory banks; their scores set one threshold per group, so no
    anomaly and no label is needed. Groups are found by HDBSCAN, which merges products far less often than the paper's
    rule where there are many images of each (the book's page on semantic centroids); with a few dozen of each,
    `clustering="finch"`, the paper's rule, can be the better one. Written: `scores.csv` (`path,
    score, group, threshold, decision`), one heat map per image under `heatmaps/`, `report.html` (self-contained), and
    the detector under `detector/`. Everything is written aside and put in place at the end.

    Raises:
        DetectError: for folders without images, unreadable images, a used output folder or too few training images.
    """
    train_dir, test_dir, out = Path(train_dir), Path(test_dir), Path(out)
    if method not in METHODS:
        raise DetectError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    if not 0 < holdout < 1:
        raise DetectError(f"holdout={holdout}: give the share of normal images that sets the thresholds, in (0, 1)")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise DetectError(f"{out} is not empty: choose another folder or pass --overwrite")
    index = _readable(_index(list_images(train_dir), list_images(test_dir)), skip_unreadable)
    is_train = (index["split"] == "train").to_numpy()
    if is_train.sum() < FEWEST:
        raise DetectError(
            f"{train_dir} holds {is_train.sum()} readable images: at least {FEWEST} normal ones are needed"
        )

    features = load_encoder(encoder, image_size, device).extract(index)
    train, test = features.subset(is_train), features.subset(~is_train)
    held = hold_out(len(train), holdout, seed)
    print(f"memory banks: {(~held).sum()} images; thresholds: {held.sum()} images held out", flush=True)
    options = {"clustering": clustering} if method == "hiercore" else {}
    detector = METHODS[method](ratio=ratio, seed=seed, device=device, **options).fit(train.subset(~held))
    groups = len(detector.banks) if method == "hiercore" else 1
    normal = detector.score(train.subset(held))
    limits = normal_thresholds(normal.image, normal.group, quantile=quantile)
    print(f"scoring {len(test)} images against {groups} group{'s' * (groups > 1)}", flush=True)
    scores = detector.score(test)
    table = _table(test, test_dir, scores, limits)

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        table.to_csv(aside / "scores.csv", index=False, float_format="%.6g")
        detector.save(aside / "detector")
        thumbnails = _heat_maps(aside / "heatmaps", test, scores, table, report_images)
        rule = "median + 4.5 MAD" if quantile is None else f"quantile {quantile:g}"
        conditions = {
            "method": f"{type(detector).__name__}, coreset ratio {ratio:g}, seed {seed}",
            "groups": f"{groups}, by {clustering}" if method == "hiercore" else "1",
            "encoder": f"{encoder} at {image_size} px, weights {features.encoder['weights_hash'][:12]}",
            "normal images": f"{(~held).sum()} in the banks, {held.sum()} held out for thresholds",
            "thresholds": f"{rule} of the held-out normal scores, per group where it has enough of them",
            "test images": f"{len(test)}, {(table.decision == 'anomalous').sum()} decided anomalous",
        }
        (aside / "report.html").write_text(_report(table, thumbnails, conditions), encoding="utf-8")
        aside.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return table


def _table(test: Features, test_dir: Path, scores: Scores, limits: dict[int, float]) -> pd.DataFrame:
    threshold = np.array([limits.get(int(group), limits[-1]) for group in scores.group])
    return pd.DataFrame(
        {
            "path": [Path(p).relative_to(test_dir).as_posix() for p in test.index["path"]],
            "score": scores.image.astype(float),
            "group": scores.group,
            "threshold": threshold,
            "decision": np.where(scores.image >= threshold, "anomalous", "normal"),
        }
    )


def _heat_maps(folder: Path, test: Features, scores: Scores, table: pd.DataFrame, keep: int) -> dict[int, str]:
    """Write one overlay per image; return the `keep` highest-ranked ones as data URIs by row."""
    ranked = set((table["score"] / table["threshold"]).sort_values(ascending=False).index[:keep])
    colours, thumbnails = matplotlib.colormaps["inferno"], {}
    for row in tqdm(range(len(table)), desc="heat maps", unit="image"):
        image = Image.fromarray(read_image(test.index["path"].iloc[row]))
        image.thumbnail((512, 512))
        values = Image.fromarray(scores.patch[row]).resize(image.size, Image.Resampling.BILINEAR)
        share = np.clip(np.asarray(values) / table["threshold"].iloc[row] - 0.5, 0, 1)[..., None]  # 0.5 = threshold
        heat = np.asarray(colours(share[..., 0]))[..., :3] * 255
        overlay = np.asarray(image) * (1 - 0.65 * share) + heat * 0.65 * share
        target = folder / Path(table["path"].iloc[row]).with_suffix(".jpg")
        target = target.with_name(target.stem + Path(table["path"].iloc[row]).suffix.lower().replace(".", "_") + ".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(overlay.round().astype(np.uint8))
        picture.save(target, quality=88)
        if row in ranked:
            pair = Image.new("RGB", (2 * THUMBNAIL, THUMBNAIL), "white")
            for i, part in enumerate((image, picture)):
                small = part.copy()
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                pair.paste(small, (i * THUMBNAIL, 0))
            buffer = io.BytesIO()
            pair.save(buffer, "JPEG", quality=80)
            thumbnails[row] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return thumbnails


def _by_folder(table: pd.DataFrame) -> str:
    """Return a table of decisions per sub-folder and, where one is called `good`, the image AUROC against it."""
    folder = table["path"].str.rpartition("/")[0].replace("", ".")
    counts = table.groupby(folder)["decision"].agg(
        images="size",
        anomalous=lambda d: int((d == "anomalous").sum()),
        share=lambda d: f"{(d == 'anomalous').mean():.0%}",
    )
    text = counts.reset_index(names="folder").to_html(index=False, border=0)
    good = folder.str.rpartition("/")[2] == "good"
    if good.any() and not good.all():
        auroc = image_metrics((~good).astype(int).to_numpy(), table["score"].to_numpy())["auroc"]
        text += (
            f"<p>With the folder <code>good</code> as normal: image AUROC {auroc:.3f} (not used by the thresholds).</p>"
        )
    return text


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
th,td{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd}
.card{display:inline-block;margin:.35rem;padding:.4rem;border:1px solid #ddd;border-radius:6px;width:354px;
vertical-align:top}
.card.anomalous{border-color:#D55E00;border-width:2px}.card p{margin:.2rem 0;font-size:13px;overflow-wrap:anywhere}
"""


def _report(table: pd.DataFrame, thumbnails: dict[int, str], conditions: dict[str, str]) -> str:
    order = (table["score"] / table["threshold"]).sort_values(ascending=False).index
    cards = []
    for row in order:
        item = table.loc[row]
        if row in thumbnails:
            cards.append(
                f'<div class="card {item.decision}"><img alt="image and heat map" src="{thumbnails[row]}">'
                f"<p><b>{item.decision}</b>, score {item.score:.3f}, threshold {item.threshold:.3f}, "
                f"group {item.group}</p>"
                f"<p>{html.escape(item.path)}</p></div>"
            )
    shown = f"{len(cards)} of {len(table)} images" if len(cards) < len(table) else f"all {len(table)} images"
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in conditions.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>hclib detect</title><style>{_STYLE}</style>'
        f"<h1>Anomaly report</h1><table>{rows}</table><h2>Decisions per folder</h2>{_by_folder(table)}"
        f"<h2>Images, highest score over threshold first</h2><p>Showing {shown}. Left the image, right its heat map; "
        f"the colour scale runs from half to one and a half times the threshold. All maps are under "
        f"<code>heatmaps/</code>, all numbers "
        f"in <code>scores.csv</code>.</p>{''.join(cards)}</html>"
    )
