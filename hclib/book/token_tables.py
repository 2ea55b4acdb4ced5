"""What semantic clustering makes of image tokens: levels, rules, agreement with the classes (HierCore, Figure 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from IPython.display import Markdown
from sklearn.metrics import adjusted_rand_score, completeness_score, homogeneity_score, normalized_mutual_info_score

from hclib.book import report
from hclib.kernels.clustering import Clusters, semantic_clusters
from hclib.paths import data_roots

RULES = {
    "FINCH, highest silhouette (paper)": {},
    "HDBSCAN, at least 5 images": {"method": "hdbscan", "min_cluster_size": 5},
    "HDBSCAN, at least 10 images": {"method": "hdbscan"},
    "HDBSCAN, at least 20 images": {"method": "hdbscan", "min_cluster_size": 20},
}
PAPER_RULE, DENSITY_RULE = "FINCH, highest silhouette (paper)", "HDBSCAN, at least 10 images"
CLIP_TOKENS = {"MVTec AD": "mvtec_clip_vitl14_336", "VisA": "visa_clip_vitl14_336"}


def clip_tokens(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the CLIP ViT-L/14-336 class tokens of a benchmark's test images, and their categories.

    Args:
        dataset: "MVTec AD" or "VisA".

    Returns:
        `(N, 768)` float32 and `(N,)` names.

    Raises:
        FileNotFoundError: if no data root holds `features/<name>.npz`.
    """
    name = f"features/{CLIP_TOKENS[dataset]}.npz"
    for root in data_roots():
        if (root / name).is_file():
            with np.load(root / name, allow_pickle=False) as stored:
                return stored["tokens"].astype(np.float32), stored["category"].astype(str)
    raise FileNotFoundError(f"{name} is in none of {[str(r) for r in data_roots()]}: set HCLIB_DATA to its folder")


def agreement(labels: np.ndarray, categories: np.ndarray) -> dict:
    """Compare a partition with the classes.

    Returns:
        `clusters`, `ARI`, `NMI`, `homogeneity`, `completeness`, and `merged classes`: how many classes have most of
        their images in a cluster in which another class has most of its images, too.
    """
    home = pd.Series(labels).groupby(np.asarray(categories)).agg(lambda values: values.mode().iloc[0])
    return {
        "clusters": len(np.unique(labels)),
        "ARI": adjusted_rand_score(categories, labels),
        "NMI": normalized_mutual_info_score(categories, labels),
        "homogeneity": homogeneity_score(categories, labels),
        "completeness": completeness_score(categories, labels),
        "merged classes": int(home.duplicated(keep=False).sum()),
    }


def level_table(clusters: Clusters, categories: np.ndarray) -> pd.DataFrame:
    """Return one row per level of the hierarchy: silhouette, agreement with the classes, and which level was chosen."""
    rows = []
    for level, silhouette in enumerate(clusters.silhouettes):
        labels = clusters.hierarchy[:, level]
        chosen = np.array_equal(labels, clusters.labels)
        rows.append({"silhouette": silhouette, **agreement(labels, categories), "chosen": "yes" if chosen else ""})
    return pd.DataFrame(rows).set_index("clusters")


def rule_table(tokens: np.ndarray, categories: np.ndarray) -> pd.DataFrame:
    """Return the agreement with the classes under every rule for choosing the level."""
    found = {name: semantic_clusters(tokens, **options).labels for name, options in RULES.items()}
    rows = {name: agreement(labels, categories) for name, labels in found.items()}
    return pd.DataFrame(rows).T.assign(classes=len(np.unique(categories)))


def class_subsets(
    tokens: np.ndarray, categories: np.ndarray, *, draws: int, fewest: int, seed: int, progress: Callable = iter
) -> pd.DataFrame:
    """Cluster random subsets of the classes under every rule: does a rule find as many groups as there are classes?

    Args:
        tokens: `(N, D)` of all classes.
        categories: `(N,)` class names.
        draws: subsets to draw, of `fewest` up to all classes.
        fewest: smallest number of classes in a subset.
        seed: seeds the draws.
        progress: wraps the iteration, for a progress bar.

    Returns:
        One row per draw and rule, with `classes` and the columns of `agreement`.
    """
    rng, names, rows = np.random.default_rng(seed), np.unique(categories), []
    for draw in progress(range(draws)):
        chosen = rng.choice(names, rng.integers(fewest, len(names) + 1), replace=False)
        part = np.isin(categories, chosen)
        for rule, options in RULES.items():
            found = agreement(semantic_clusters(tokens[part], **options).labels, categories[part])
            rows.append({"draw": draw, "rule": rule, "classes": len(chosen), **found})
    return pd.DataFrame(rows)


def rule_verdicts(
    subsets: pd.DataFrame, levels: dict[str, pd.DataFrame], base: dict, page: str = "13_hiercore_semantic_centroids"
) -> list[Markdown]:
    """Test whether the silhouette rule finds the classes, and whether the safer rule merges fewer; record both."""
    chosen = {name: table[table["chosen"] == "yes"].reset_index().iloc[0] for name, table in levels.items()}
    keys = {k: base[k] for k in ("profile", "encoder", "image_size")} | {"dataset": ", ".join(levels), "page": page}
    merged = subsets.assign(merges=subsets["merged classes"] > 0).groupby("rule")["merges"].mean()
    extra = (subsets["clusters"] / subsets["classes"]).groupby(subsets["rule"]).mean()
    draws = f"{len(subsets) // len(RULES)} random subsets of classes"
    found = "; ".join(
        f"{name}: {row['clusters']} groups, ARI {row['ARI']:.2f}, {row['merged classes']} merged classes"
        for name, row in chosen.items()
    )
    return [
        report.claim(
            "silhouette-finds-classes",
            "The FINCH level of the highest silhouette separates the classes.",
            all(row["merged classes"] == 0 for row in chosen.values()),
            f"{found}. Over {draws}, it merged classes in {merged[PAPER_RULE]:.0%}.",
            source="HierCore, 3.1 and Figure 4",
            **keys,
        ),
        report.claim(
            "density-is-safer",
            "Groups by density (HDBSCAN, at least 10 images each) merge classes less often than the silhouette rule.",
            bool(merged[DENSITY_RULE] < merged[PAPER_RULE]) if merged.max() > 0 else None,
            f"Over {draws}: {merged[DENSITY_RULE]:.0%} instead of {merged[PAPER_RULE]:.0%}, with "
            f"{extra[DENSITY_RULE]:.2f} instead of {extra[PAPER_RULE]:.2f} groups per class.",
            source="this book's own",
            **keys,
        ),
    ]
