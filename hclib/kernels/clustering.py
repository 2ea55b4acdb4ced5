"""Semantic groups of image tokens: FINCH with the silhouette rule, k-means, DBSCAN, HDBSCAN, or given labels.

After HierCore, section 3.1: cluster the tokens of normal images, take the level of the FINCH hierarchy with
the highest silhouette, use the mean token of each cluster as its key (equation 1), and send an image to the
key that is nearest in L2 (equation 2). The last two steps mean that an image's routed group can differ from
its cluster label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from finch import FINCH
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from hclib.kernels.distances import nearest

EXACT_ROWS = 20_000  # FINCH searches first neighbours exactly up to here, by seeded NN-descent beyond


@dataclass(frozen=True)
class Clusters:
    """A partition of N image tokens into K groups.

    Attributes:
        labels: (N,) int64, 0..K-1 in the order in which groups first appear in the rows.
        keys: (K, D) float32, mean token of each group.
        silhouette: of `labels`; NaN where it is undefined (one group, or as many groups as images).
        levels: cluster counts of the partitions that were compared; for FINCH its hierarchy, finest first.
        silhouettes: the silhouette of each of `levels`, NaN where undefined.
        hierarchy: (N, len(levels)) int64, labels of every compared partition.
        names: the K class names where labels were given, else None.
        normalised: whether tokens are divided by their L2 norm before they are averaged and routed.
    """

    labels: np.ndarray
    keys: np.ndarray
    silhouette: float
    levels: tuple[int, ...]
    silhouettes: tuple[float, ...]
    hierarchy: np.ndarray
    names: tuple[str, ...] | None = None
    normalised: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def route(self, tokens: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the nearest key of every token in L2: (N, D) -> (N,) int64.

        Raises:
            ValueError: the tokens are not (N, D) like those that were clustered, or not finite.
        """
        values = _unit(_rows(tokens)) if self.normalised else _rows(tokens)
        return nearest(torch.from_numpy(values), torch.from_numpy(self.keys))[1][:, 0].numpy()


def semantic_clusters(tokens: np.ndarray | torch.Tensor, method: str = "finch", **options: Any) -> Clusters:
    """Group image tokens without labels.

    Fewer than three images, or images that are all alike, form a single group whatever the method.

    Args:
        tokens: (N, D) floating point, N >= 1.
        method: "finch" (the paper's), "kmeans", "dbscan" or "hdbscan".
        options: of `finch_partitions`, `kmeans_partitions`, `dbscan_partitions` or `hdbscan_partitions`, and for each
            method `level` (int, index into `levels`, instead of the highest silhouette), `metric` of the silhouette
            ("euclidean", scikit-learn's default, or "cosine"), `min_silhouette` (below it, all images form one group;
            None, the paper's rule, never does), and `normalise` (divide tokens by their L2 norm before clustering,
            averaging and routing; False).

    Returns:
        `Clusters`.

    Raises:
        ValueError: unknown method or option, tokens that are not (N, D) or not finite, a level or a number of
            clusters that the tokens do not give.
    """
    makers = {
        "finch": finch_partitions,
        "kmeans": kmeans_partitions,
        "dbscan": dbscan_partitions,
        "hdbscan": hdbscan_partitions,
    }
    if method not in makers:
        raise ValueError(f"method {method!r}: choose one of {', '.join(makers)}")
    rule = {name: options.pop(name) for name in ("level", "metric", "min_silhouette") if name in options}
    normalise = options.pop("normalise", False)
    allowed = makers[method].__kwdefaults__
    if not options.keys() <= allowed.keys():
        extra = ", ".join(sorted(options.keys() - allowed.keys()))
        common = "level, metric, min_silhouette, normalise"
        raise ValueError(f"{method} has no option {extra}; it has {', '.join(allowed)} and {common}")
    values = _unit(_rows(tokens)) if normalise else _rows(tokens)
    alike = np.ptp(values, axis=0).max() <= 1e-6 * np.abs(values).max()
    partitions = [] if len(values) < 3 or alike else makers[method](values, **options)
    return _choose(values, partitions, normalised=normalise, **rule)


def clusters_from_labels(
    tokens: np.ndarray | torch.Tensor, labels: Sequence[str], *, normalise: bool = False
) -> Clusters:
    """Group image tokens by known class names.

    Args:
        tokens: (N, D) floating point.
        labels: N class names.
        normalise: divide tokens by their L2 norm before averaging and routing.

    Returns:
        `Clusters` whose `names` are the sorted class names; `labels` index into them.

    Raises:
        ValueError: another number of labels than tokens.
    """
    values = _unit(_rows(tokens)) if normalise else _rows(tokens)
    names, index = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)
    if len(index) != len(values):
        raise ValueError(f"{len(index)} labels for {len(values)} tokens: one class name each")
    silhouette = _silhouette(values, index, "euclidean")
    hierarchy = index.astype(np.int64)[:, None]
    keys = _means(values, index)
    return Clusters(
        hierarchy[:, 0],
        keys,
        silhouette,
        (len(names),),
        (silhouette,),
        hierarchy,
        tuple(map(str, names)),
        normalise,
    )


def finch_partitions(
    tokens: np.ndarray,
    *,
    n_clusters: int | None = None,
    distance: str = "cosine",
    seed: int = 0,
) -> list[np.ndarray]:
    """Return the FINCH hierarchy (Sarfraz et al., CVPR 2019), finest level first, as finch-clust 0.2.3 gives it.

    Every row is linked to its first neighbour, connected components are clusters, and the next level goes on with
    their means. From the second level on a link is cut where it is longer than the longest first-neighbour link of
    the tokens; a level that merges a single pair ends the list and is dropped. Version 0.2.0, which HierCore names,
    ends its list earlier or later on the same data ([34, 7] against [34, 7, 2], reference notes 0.8): it cuts by
    other link lengths. Its licence is non-commercial; this project uses 0.2.3 (MIT) alone.

    Args:
        tokens: (N, D) float32.
        n_clusters: merge the nearest clusters of the level above until this many are left (the program's
            `req_clust`); the result then is this one partition.
        distance: between tokens, "cosine" or "euclidean".
        seed: of the approximate neighbours beyond 20,000 rows.

    Returns:
        Labels (N,) int64 of every level.

    Raises:
        ValueError: `n_clusters` outside 1..(clusters of the finest level).
    """
    options = {"distance": distance, "ann_threshold": EXACT_ROWS, "random_state": seed}
    if n_clusters is not None and n_clusters < 1:
        raise ValueError(f"n_clusters {n_clusters}: at least one")
    columns, counts, _ = FINCH(tokens, **options)
    if n_clusters is None:
        return list(columns.T.astype(np.int64))
    if n_clusters > counts[0]:
        raise ValueError(f"n_clusters {n_clusters}: FINCH's finest level has {counts[0]} clusters, and it only merges")
    if n_clusters == 1:
        return [np.zeros(len(tokens), np.int64)]
    return [np.asarray(FINCH(tokens, req_clust=n_clusters, **options)[2], np.int64)]


def kmeans_partitions(
    tokens: np.ndarray, *, n_clusters: int | None = None, max_clusters: int = 20, seed: int = 0
) -> list[np.ndarray]:
    """Return k-means partitions (Lloyd, ten seeded starts) of `n_clusters`, or of every count from 2 on.

    Args:
        tokens: (N, D) float32.
        n_clusters: the one count wanted; None compares 2..`max_clusters` by their silhouette.
        max_clusters: the largest count compared.
        seed: of the starts.

    Returns:
        Labels (N,) int64 of every partition.

    Raises:
        ValueError: `n_clusters` outside 1..(distinct tokens).
    """
    distinct = len(np.unique(tokens, axis=0))
    if n_clusters is not None and not 1 <= n_clusters <= distinct:
        raise ValueError(f"n_clusters {n_clusters}: must lie between 1 and the {distinct} distinct tokens")
    counts = [n_clusters] if n_clusters is not None else range(2, min(max_clusters, distinct) + 1)
    fits = (KMeans(count, n_init=10, random_state=seed).fit(tokens) for count in counts)
    return [fit.labels_.astype(np.int64) for fit in fits]


def dbscan_partitions(
    tokens: np.ndarray, *, eps: float | None = None, min_samples: int = 5, quantile: float = 0.95
) -> list[np.ndarray]:
    """Return DBSCAN's partition; noise joins the cluster whose mean is nearest in L2.

    Args:
        tokens: (N, D) float32.
        eps: radius of a neighbourhood in L2; None takes the `quantile` of the distances to the
            `min_samples`-th nearest other token, so that most tokens are core points of their cluster.
        min_samples: tokens in the neighbourhood of a core point.
        quantile: see `eps`.

    Returns:
        One array of labels (N,) int64; a single cluster where DBSCAN finds only noise.

    Raises:
        ValueError: `eps` or `quantile` is out of range.
    """
    if eps is None:
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile {quantile}: must lie in (0, 1]")
        neighbors = NearestNeighbors(n_neighbors=min(min_samples, len(tokens) - 1)).fit(tokens)
        eps = max(float(np.quantile(neighbors.kneighbors()[0][:, -1], quantile)), np.finfo(np.float32).tiny)
    if not 0 < eps < math.inf:
        raise ValueError(f"eps {eps}: a radius is positive")
    return [_noise_to_nearest(tokens, DBSCAN(eps=eps, min_samples=min_samples).fit(tokens).labels_)]


def hdbscan_partitions(tokens: np.ndarray, *, min_cluster_size: int = 10, distance: str = "cosine") -> list[np.ndarray]:
    """Return HDBSCAN's partition (Campello et al., 2013); noise joins the cluster whose mean is nearest in L2.

    Every cluster is cut where it is most stable, so families of similar classes may lie at another scale than the
    classes in them; one level for all, as the silhouette rule takes, cannot follow that.

    Args:
        tokens: (N, D) float32.
        min_cluster_size: images that a cluster has at least, and the neighbours that make a token's density.
        distance: "cosine" (tokens on the unit sphere, then L2) or "euclidean".

    Returns:
        One array of labels (N,) int64; a single cluster where HDBSCAN finds only noise.

    Raises:
        ValueError: `min_cluster_size` below 2, or an unknown distance.
    """
    if min_cluster_size < 2:
        raise ValueError(f"min_cluster_size {min_cluster_size}: a cluster holds at least two images")
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f'distance {distance!r}: choose "cosine" or "euclidean"')
    if len(tokens) < min_cluster_size:
        return [np.zeros(len(tokens), np.int64)]
    values = _unit(tokens) if distance == "cosine" else tokens
    algorithm = "brute" if len(tokens) <= EXACT_ROWS else "auto"  # brute: (N, N) float64
    model = HDBSCAN(min_cluster_size=min_cluster_size, algorithm=algorithm, copy=True)
    return [_noise_to_nearest(values, model.fit(values).labels_)]


def _noise_to_nearest(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give noise (-1) to the cluster whose mean is nearest in L2; all noise is one cluster."""
    labels = labels.astype(np.int64)
    noise = labels < 0
    if noise.all():
        return np.zeros(len(tokens), np.int64)
    if noise.any():
        keys = torch.from_numpy(_means(tokens[~noise], labels[~noise]))
        labels[noise] = nearest(torch.from_numpy(tokens[noise]), keys)[1][:, 0].numpy()
    return labels


def _choose(
    tokens: np.ndarray,
    partitions: list[np.ndarray],
    *,
    level: int | None = None,
    metric: str = "euclidean",
    min_silhouette: float | None = None,
    normalised: bool = False,
) -> Clusters:
    """Pick the partition with the highest silhouette, or the one that `level` names."""
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'metric {metric!r}: choose "euclidean" or "cosine"')
    partitions = [_in_order_of_appearance(labels) for labels in partitions or [np.zeros(len(tokens), np.int64)]]
    silhouettes = [_silhouette(tokens, labels, metric) for labels in partitions]
    if level is not None and not -len(partitions) <= level < len(partitions):
        counts = [int(labels.max()) + 1 for labels in partitions]
        raise ValueError(f"level {level}: there are {len(partitions)} levels, of {counts} clusters")
    if level is None and len(partitions) > 1 and not np.isnan(silhouettes).all():
        level = int(np.nanargmax(silhouettes))
    elif level is None and len(partitions) > 1:
        level = -1  # no level has a silhouette
    labels, silhouette = partitions[level or 0], silhouettes[level or 0]
    if min_silhouette is not None and not silhouette >= min_silhouette:
        labels, silhouette = np.zeros(len(tokens), np.int64), math.nan
    return Clusters(
        labels=labels,
        keys=_means(tokens, labels),
        silhouette=silhouette,
        levels=tuple(int(each.max()) + 1 for each in partitions),
        silhouettes=tuple(silhouettes),
        hierarchy=np.stack(partitions, 1),
        normalised=normalised,
    )


def _silhouette(tokens: np.ndarray, labels: np.ndarray, metric: str) -> float:
    count = len(np.unique(labels))
    return float(silhouette_score(tokens, labels, metric=metric)) if 1 < count < len(tokens) else math.nan


def _in_order_of_appearance(labels: np.ndarray) -> np.ndarray:
    _, first, index = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[index].astype(np.int64)


def _means(tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the mean token of every label 0..K-1, (K, D) float32."""
    return np.stack([tokens[labels == k].mean(0, dtype=np.float64) for k in range(labels.max() + 1)]).astype(np.float32)


def _unit(tokens: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(tokens, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"tokens: row {int(np.argmin(norms))} is zero and cannot be normalised")
    return tokens / norms


def _rows(tokens: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return tokens as (N, D) float32 on the CPU, checked."""
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    values = np.ascontiguousarray(tokens, dtype=np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"tokens: shape {values.shape}; expected (N, D) with at least one image")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise ValueError(f"tokens: row {row} holds NaN or infinity")
    return values
