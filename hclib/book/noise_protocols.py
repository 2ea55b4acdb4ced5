"""What five papers mean by "10 % noise", as calls of `contaminate`, and what comes of them on one data set."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from hclib.book import report
from hclib.data.contamination import contaminate, load_manifest, realised
from hclib.paths import data_roots

COUNT = 40  # images that InReaCh's program moves, whatever the size of the category


def protocols(ratio: float) -> dict[str, dict]:
    """Return the protocols by name: options of `contaminate` for a nominal ratio."""
    return {
        "MeDS (experiments), FUN-AD overlap": {"ratio": ratio, "definition": "per_normal", "overlap": True},
        "MeDS (definition in its text)": {"ratio": ratio, "definition": "of_total", "overlap": True},
        "FUN-AD no overlap, SoftPatch": {"ratio": ratio, "definition": "per_normal", "overlap": False},
        "open-iad": {"ratio": ratio, "definition": "per_normal", "overlap": False, "cap": 0.75},
        "InReaCh": {"ratio": COUNT, "definition": "count", "overlap": True},
    }


def protocol_table(index: pd.DataFrame, ratio: float, seed: int) -> pd.DataFrame:
    """Return what each protocol does to an index: images injected, both realised ratios, what is left to test."""
    rows = {}
    for name, options in protocols(ratio).items():
        noisy, manifest = contaminate(index, seed=seed, **options)
        table = realised(manifest)
        test = noisy[(noisy["split"] == "test") & (noisy["label"] == 1)]
        injected = set(manifest["path"])
        rows[name] = {
            "injected": int(table.loc["all", "moved"]),
            "anomalies / normals in %": table.loc["all", "per_normal"] * 100,
            "anomalies / all in %": table.loc["all", "of_total"] * 100,
            "categories that ran out": int((table.drop("all")["moved"] < table.drop("all")["asked"]).sum()),
            "anomalous test images": len(test),
            "of them trained on": int(test["path"].isin(injected).sum()),
        }
    return pd.DataFrame(rows).T.rename_axis("protocol").astype(float).round(1).map("{:g}".format)


def category_table(index: pd.DataFrame, ratio: float, seed: int) -> pd.DataFrame:
    """Return the realised ratio of every category, anomalies / all in percent, a column per protocol."""
    columns = {}
    for name, options in protocols(ratio).items():
        columns[name] = realised(contaminate(index, seed=seed, **options)[1])["of_total"] * 100
    return pd.DataFrame(columns)


def published_lists(names: list[str]) -> dict[str, Path]:
    """Return the files of MeDS's published lists by name (without ".csv"), from the data roots.

    Raises:
        FileNotFoundError: a list that is in no data root.
    """
    found = {}
    for name in names:
        places = [root / "meds_manifests" / f"{name}.csv" for root in data_roots()]
        files = [place for place in places if place.is_file()]
        if not files:
            raise FileNotFoundError(f"{name}.csv is in no folder meds_manifests of the data roots; set HCLIB_DATA")
        found[name] = files[0]
    return found


def published_table(names: list[str]) -> pd.DataFrame:
    """Return nominal and realised ratios of MeDS's published training lists, one row each."""
    rows = []
    for name, file in published_lists(names).items():
        manifest = load_manifest(file)
        table = realised(manifest)
        short = table.drop("all").query("moved < asked").index
        rows.append(
            {
                "list": name.removeprefix("train_"),
                "nominal in %": manifest["ratio"].iloc[0] * 100,
                "normal": int(table.loc["all", "normals"]),
                "anomalous": int(table.loc["all", "moved"]),
                "anomalies / normals in %": round(table.loc["all", "per_normal"] * 100, 1),
                "anomalies / all in %": round(table.loc["all", "of_total"] * 100, 1),
                "categories that ran out": len(short),
            }
        )
    return pd.DataFrame(rows).set_index("list")


def ratio_bars(table: pd.DataFrame, nominal: float) -> Figure:
    """Draw the realised share of every category and protocol (`category_table`), the nominal ratio as a line."""
    figure, ax = plt.subplots(figsize=(7.0, 0.9 + 0.42 * len(table)))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.95, table.shape[1]))  # protocols, not methods
    for k, (name, values) in enumerate(table.items()):
        place = [i + (k - (table.shape[1] - 1) / 2) * 0.16 for i in range(len(table))]
        ax.barh(place, values, height=0.15, color=colours[k], label=name)
    ax.axvline(nominal * 100, color="black", ls="--", lw=1, label=f'"{nominal:.0%}"')
    ax.set_yticks(range(len(table)), [name.replace("_", " ") for name in table.index])
    ax.invert_yaxis()
    ax.set_xlabel("anomalous share of the training images in %")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5)
    return figure


def effect_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return AUROC in percent per protocol: a column per method and level, mean ± spread over seeds."""
    rows = results.query("category == 'mean' and test_set == 'own' and epoch == 'last'")
    text = report.spread(rows, ["protocol", "level", "method"], "auroc", scale=100, digits=1)
    return text.unstack(["level", "method"]).rename_axis(columns=["AUROC in %", None])


def protocol_verdicts(results: pd.DataFrame, base: dict, nominal: float, page: str) -> list[Markdown]:
    """Test whether the protocol matters more than the method, and record it."""
    rows = results.query("category == 'mean' and test_set == 'own' and epoch == 'last'")
    rows = rows[~rows["protocol"].isin(["clean", "InReaCh"])]  # InReaCh's program has no ratio to compare
    means = rows.groupby(["level", "method", "protocol"])["auroc"].mean() * 100
    within = means.groupby(["level", "method"]).agg(lambda v: v.max() - v.min())
    across = means.groupby(["level", "protocol"]).agg(lambda v: v.max() - v.min())
    parts = [
        f"{level} level: {within[level].max():.1f} points between protocols ({within[level].idxmax()}), "
        f"{across[level].max():.1f} between methods at most"
        for level in ("image", "pixel")
    ]
    holds = all(within[level].max() > across[level].max() for level in ("image", "pixel"))
    where = f"{base['dataset']}, {base['encoder']} at {base['image_size']} px, nominal {nominal:.0%}"
    verdict = report.claim(
        "protocol-over-method",
        "What an author means by the same noise ratio moves AUROC by more than the choice between these methods.",
        bool(holds),
        "; ".join(parts) + f" ({where}).",
        source="this book; protocols of MeDS, FUN-AD, SoftPatch and open-iad",
        page=page,
        **{k: base[k] for k in ("profile", "dataset", "encoder", "image_size")},
    )
    return [verdict]


def published_verdict(table: pd.DataFrame, base: dict, page: str) -> Markdown:
    """Test whether MeDS's published lists realise their nominal ratio as its text defines it, and record it."""
    gap = table["nominal in %"] - table["anomalies / all in %"]
    worst = gap.idxmax()
    return report.claim(
        "meds-nominal",
        "The noise ratio of MeDS's training lists is anomalies / all images, as its section 3.1 defines it.",
        bool((gap.abs() < 0.5).all()),
        f"{worst} holds {table.loc[worst, 'anomalies / all in %']} % anomalous images and "
        f"{table.loc[worst, 'anomalies / normals in %']} % anomalies per normal image, with "
        f"{table.loc[worst, 'categories that ran out']} categories in which anomalies ran out.",
        source="MeDS, section 3.1 and its published lists",
        page=page,
        profile=base["profile"],
        dataset="published lists",
        encoder="none",
    )
