"""HierCore: semantic clusters of normal images, one coreset memory bank each, routing by the nearest key.

After Heo and Kang, "Multi-class image anomaly detection for practical applications" (Neurocomputing 2026), sections
3.1 to 3.3. Where the paper is silent the choice of the PatchCore reference program is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from hclib.kernels.clustering import clusters_from_labels, semantic_clusters
from hclib.kernels.distances import nearest, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.kernels.memory import MemoryBank
from hclib.methods.patchcore import build_bank, score_patches
from hclib.methods.state import load_state, save_state


class HierCore:
    """A memory bank per semantic group; trains and scores with or without class labels.

    Groups are the given classes (`fit(train, labels)`) or FINCH clusters of the image tokens, at the hierarchy level of
    the highest silhouette. A key is the mean token of a group (Eq. 1). An image belongs to the bank of the nearest key
    in L2 (Eq. 2), or to its class's bank where training and scoring both know the classes. Scores are L2 distances.

    Args:
        ratio: coreset ratio of every bank.
        neighbors: bank neighbours averaged per patch.
        squared: report squared L2 instead of L2.
        sigma: Gaussian smoothing of the pixel maps in pixels (PatchCore's program; the paper names only bilinear
            upsampling); image scores do not use it.
        image_score: "map_max", the maximum of the upsampled map (paper, 3.3), or "max" over patches (program).
        clustering: "finch", "kmeans" or "dbscan"; ignored where labels are given.
        clustering_options: further options of `hclib.kernels.clustering.semantic_clusters`, for example
            `{"n_clusters": 6}`.
        sampler: "greedy" or "random" coreset.
        projection: width of the random projection inside the coreset, None for none.
        dim: embedding width for CNN encoders.
        patch_size: neighbourhood of a local patch.
        seed: seeds clustering, projection and coresets.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        keys: `(K, D)` float32, one key per bank.
        names: the K class names where training knew them, else None.
        clusters: the clustering that made the keys (absent after `load`).
    """

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        neighbors: int = 1,
        squared: bool = False,
        sigma: float = 4.0,
        image_score: str = "map_max",
        clustering: str = "finch",
        clustering_options: dict | None = None,
        sampler: str = "greedy",
        projection: int | None = 128,
        dim: int = 1024,
        patch_size: int = 3,
        seed: int = 0,
        device: str | torch.device = "auto",
    ) -> None:
        self.bank_options = {
            "ratio": ratio,
            "sampler": sampler,
            "projection": projection,
            "dim": dim,
            "patch_size": patch_size,
        }
        self.score_options = {"neighbors": neighbors, "squared": squared, "dim": dim, "patch_size": patch_size}
        self.image_score, self.sigma = image_score, sigma
        self.clustering = clustering
        self.clustering_options = dict(clustering_options or {})
        self.seed = seed
        self.device = str(device)
        self.banks: list[MemoryBank] = []
        self.keys: torch.Tensor | None = None
        self.names: list[str] | None = None
        self.normalised = bool(self.clustering_options.get("normalise", False))
        self.clusters = None

    def fit(self, train: Features, labels: Sequence[str] | None = None) -> Self:
        """Group the training images, then build one bank per group.

        Without labels an image joins the bank of its nearest key (Eq. 2), which can differ from the cluster that
        FINCH put it in; a key that attracts no image is dropped.

        Args:
            train: Features of N normal images of any number of classes.
            labels: N class names, or None where they are unknown.

        Raises:
            ValueError: if `labels` has another length than `train`.
        """
        tokens = torch.as_tensor(np.asarray(train.tokens), dtype=torch.float32)
        if labels is None:
            options = dict(self.clustering_options)
            if self.clustering == "kmeans":
                options.setdefault("seed", self.seed)
            self.clusters = semantic_clusters(tokens, self.clustering, **options)
            group, self.names = np.asarray(self.clusters.route(tokens)), None
            used = np.unique(group)
            self.keys = torch.as_tensor(self.clusters.keys, dtype=torch.float32)[used]
            group = np.searchsorted(used, group)
        else:
            if len(labels) != len(train):
                raise ValueError(f"{len(labels)} labels for {len(train)} training images: one class name each")
            self.clusters = clusters_from_labels(tokens, labels, normalise=self.normalised)
            self.keys, self.names = torch.as_tensor(self.clusters.keys, dtype=torch.float32), list(self.clusters.names)
            group = np.asarray(self.clusters.labels)
        self.banks = [self._build(train.subset(np.flatnonzero(group == k)), k) for k in range(len(self.keys))]
        return self

    def _build(self, members: Features, k: int) -> MemoryBank:
        seed = int(np.random.SeedSequence([self.seed, k]).generate_state(1)[0])
        return build_bank(members, **self.bank_options, seed=seed, device=self.device)

    def route(self, tokens: np.ndarray | torch.Tensor) -> np.ndarray:
        """Return the nearest key of every image token in L2 (Eq. 2): `(N, D) -> (N,)` int64."""
        if self.keys is None:
            raise RuntimeError("HierCore has no keys yet: call fit(train) or HierCore.load(folder) first")
        tokens = torch.as_tensor(np.asarray(tokens), dtype=torch.float32)
        if self.normalised:
            tokens = torch.nn.functional.normalize(tokens, dim=1)
        return nearest(tokens, self.keys)[1][:, 0].cpu().numpy()

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images against the bank that each belongs to.

        Args:
            test: Features of N images.
            labels: N class names; they choose the bank where training knew the classes too (K -> K), and are ignored
                where it did not (U -> K), since banks then have no names.

        Returns:
            Scores whose `group` says which bank each image went to.

        Raises:
            ValueError: if a label names a class that training did not see.
        """
        group = self.route(test.tokens)
        if labels is not None and self.names is not None:
            unseen = sorted(set(labels) - set(self.names))
            if unseen or len(labels) != len(test):
                raise ValueError(
                    f"labels {unseen} were not in training, which knew {self.names}: score those images without labels"
                    if unseen
                    else f"{len(labels)} labels for {len(test)} test images: one class name each"
                )
            group = np.array([self.names.index(name) for name in labels], np.int64)
        patch = None
        for k in np.unique(group):
            rows = np.flatnonzero(group == k)
            values = score_patches(self.banks[k], test.subset(rows), **self.score_options)
            if patch is None:
                patch = np.empty((len(test), *values.shape[1:]), np.float32)
            patch[rows] = values
        return Scores(patch, image_scores(patch, self.image_score), group, self.sigma)

    def save(self, folder: str | Path) -> None:
        """Write options and class names (JSON), keys and banks (safetensors) to `folder`."""
        if self.keys is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        banks = {f"bank{k}": bank.points for k, bank in enumerate(self.banks)}
        save_state(folder, "HierCore", {**self._options(), "names": self.names}, {"keys": self.keys, **banks})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote; its scores are the same bit for bit."""
        options, tensors = load_state(folder, "HierCore")
        names = options.pop("names")
        detector = cls(**options, device=device)
        detector.keys, detector.names = tensors["keys"], names
        place = resolve_device(device)
        detector.banks = [MemoryBank(tensors[f"bank{k}"], place) for k in range(len(detector.keys))]
        return detector

    def _options(self) -> dict:
        return {
            **self.bank_options,
            **self.score_options,
            "image_score": self.image_score,
            "sigma": self.sigma,
            "clustering": self.clustering,
            "clustering_options": self.clustering_options,
            "seed": self.seed,
        }
