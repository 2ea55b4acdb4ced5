"""HierCore: semantic clusters of normal images, one coreset memory bank each, routing by the nearest key.

After Heo and Kang, "Multi-class image anomaly detection for practical applications" (Neurocomputing 2026), sections
3.1 to 3.3. Where the paper is silent the choice of the PatchCore reference program is taken.
"""

from __future__ import annotations

import zlib
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
from hclib.methods.patchcore import BLOCK, build_bank, score_patches
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
        clustering: "finch" (the paper's), "kmeans", "dbscan" or "hdbscan"; ignored where labels are given.
        clustering_options: further options of `hclib.kernels.clustering.semantic_clusters`, for example
            `{"n_clusters": 6}`.
        semantic_layer: feature map whose mean over positions is the image's token (the paper's program: `layer4`);
            None takes the encoder's own token.
        sampler: "greedy" or "random" coreset.
        projection: width of the random projection inside the coreset, None for none.
        dim: embedding width for CNN encoders.
        patch_size: neighbourhood of a local patch.
        seed: seeds clustering, projection and coresets.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        keys: `(K, D)` float32, one key per bank.
        counts: `(K,)` int64, training images of each bank.
        radii: `(K,)` float32, L2 from a key to the farthest of its training images.
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
        semantic_layer: str | None = None,
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
        self.semantic_layer = semantic_layer
        self.seed = seed
        self.device = str(device)
        self.banks: list[MemoryBank] = []
        self.keys: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.radii: torch.Tensor | None = None
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
        tokens = image_tokens(train, self.semantic_layer)
        if labels is None:
            options = dict(self.clustering_options)
            if self.clustering == "kmeans":
                options.setdefault("seed", self.seed)
            self.clusters, self.names = semantic_clusters(tokens, self.clustering, **options), None
            used, group = np.unique(self.clusters.route(tokens), return_inverse=True)
        else:
            if len(labels) != len(train):
                raise ValueError(f"{len(labels)} labels for {len(train)} training images: one class name each")
            self.clusters = clusters_from_labels(tokens, labels, normalise=self.normalised)
            self.names = list(self.clusters.names)
            used, group = np.arange(len(self.names)), self.clusters.labels
        self.banks, self.keys, self.counts, self.radii = [], None, None, None
        for number, key in enumerate(torch.as_tensor(self.clusters.keys, dtype=torch.float32)[used]):
            self._append(train, tokens, np.flatnonzero(group == number), key)
        return self

    def extend(self, new: Features, labels: Sequence[str] | None = None) -> np.ndarray:
        """Add the images of newly arrived products without rebuilding the banks of the others.

        The new images are grouped by themselves, by `labels` or by clustering. A group with a known name, or without
        labels one whose key lies within the radius of an existing group, joins that group: its coreset is added to the
        bank, and the key becomes the mean over old and new images. Every other group gets a key and a bank of its own.
        Banks that no new image joins keep their bytes, which are those that fitting all images at once would give to
        the same groups. Images seen earlier are not routed again.

        Args:
            new: Features of M normal images.
            labels: M class names where `fit` was given names, else None.

        Returns:
            `(M,)` int64, the bank that each new image went to.

        Raises:
            RuntimeError: if the detector was not fitted.
            ValueError: if labels are given to a detector that was trained without, or the other way round, or their
                number is wrong.
        """
        if self.keys is None:
            raise RuntimeError("HierCore has no groups to extend yet: call fit(train) or HierCore.load(folder) first")
        if (labels is None) != (self.names is None):
            known = "did not know class names" if self.names is None else f"knew the classes {self.names}"
            raise ValueError(f"training {known}: extend {'without' if self.names is None else 'with'} labels")
        other = HierCore(**self._options(), device=self.device).fit(new, labels)
        distance, nearest_key = nearest(other.keys, self.keys)
        joined = np.empty(len(other.keys), np.int64)
        for number in range(len(other.keys)):
            if self.names is not None:
                name = other.names[number]
                target = self.names.index(name) if name in self.names else len(self.names)
                self.names += [name] if target == len(self.names) else []
            else:
                near = distance[number, 0] <= self.radii[nearest_key[number, 0]]
                target = int(nearest_key[number, 0]) if near else len(self.keys)
            self._adopt(other, number, target)
            joined[number] = target
        group = other.clusters.labels if labels is not None else other.route(image_tokens(new, self.semantic_layer))
        self.clusters = None
        return joined[group]

    def _append(self, train: Features, tokens: torch.Tensor, rows: np.ndarray, key: torch.Tensor) -> None:
        """Build the bank of one group and note its key, size and radius; the key seeds the coreset."""
        number = zlib.crc32(key.numpy().tobytes())
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.banks.append(build_bank(train.subset(rows), **self.bank_options, seed=seed, device=self.device))
        members = torch.nn.functional.normalize(tokens[rows], dim=1) if self.normalised else tokens[rows]
        radius = torch.linalg.vector_norm(members - key, dim=1).amax()
        self._note(key, torch.tensor(len(rows)), radius)

    def _note(self, key: torch.Tensor, count: torch.Tensor, radius: torch.Tensor) -> None:
        old = (self.keys, self.counts, self.radii)
        new = (key[None], count[None], radius[None])
        self.keys, self.counts, self.radii = (
            now if before is None else torch.cat([before, now]) for before, now in zip(old, new, strict=True)
        )

    def _adopt(self, other: HierCore, number: int, target: int) -> None:
        """Take a group of another detector over, as a group of its own or into an existing one."""
        key, count, radius = other.keys[number], other.counts[number], other.radii[number]
        if target == len(self.keys):
            self.banks.append(other.banks[number])
            self._note(key, count, radius)
            return
        bank, old, total = self.banks[target], self.keys[target].clone(), self.counts[target] + count
        self.banks[target] = MemoryBank(torch.cat([bank.points, other.banks[number].points]), bank.device)
        mean = (old * self.counts[target] + key * count) / total
        reach = [
            torch.linalg.vector_norm(old - mean) + self.radii[target],
            torch.linalg.vector_norm(key - mean) + radius,
        ]
        self.keys[target], self.counts[target], self.radii[target] = mean, total, max(reach)

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
        group = self.route(image_tokens(test, self.semantic_layer))
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
        save_state(folder, "HierCore", {**self._options(), "names": self.names}, {**self._groups(), **banks})

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote; its scores are the same bit for bit."""
        options, tensors = load_state(folder, "HierCore")
        names = options.pop("names")
        detector = cls(**options, device=device)
        detector.names = names
        detector.keys, detector.counts, detector.radii = (tensors[part] for part in ("keys", "counts", "radii"))
        place = resolve_device(device)
        detector.banks = [MemoryBank(tensors[f"bank{k}"], place) for k in range(len(detector.keys))]
        return detector

    def _groups(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "counts": self.counts, "radii": self.radii}

    def _options(self) -> dict:
        return {
            **self.bank_options,
            **self.score_options,
            "image_score": self.image_score,
            "sigma": self.sigma,
            "clustering": self.clustering,
            "clustering_options": self.clustering_options,
            "semantic_layer": self.semantic_layer,
            "seed": self.seed,
        }


def image_tokens(features: Features, layer: str | None = None) -> torch.Tensor:
    """Return one token per image: the encoder's own, or the mean of a feature map over its positions.

    Args:
        features: Features of N images.
        layer: a feature map of `features.maps`, or None.

    Returns:
        `(N, D)` float32.

    Raises:
        ValueError: if the features have no such layer.
    """
    if layer is None:
        return torch.as_tensor(np.asarray(features.tokens), dtype=torch.float32)
    if layer not in features.maps:
        raise ValueError(f"semantic_layer={layer!r}: the features have {', '.join(features.maps)}")
    maps = features.maps[layer]
    blocks = (np.asarray(maps[start : start + BLOCK], np.float32) for start in range(0, len(features), BLOCK))
    return torch.from_numpy(np.concatenate([block.mean((1, 2)) for block in blocks]))
