"""FUN-AD: a small network learns from pseudo-labels, which distances to a changing memory give, to find anomalies.

After Im, Son and Hong, "FUN-AD: Fully Unsupervised Learning for Anomaly Detection with Noisy Training Data" (WACV
2025). Only its supplement is at hand; the main text's equations follow the notes on the authors' program (commit
66e0230; lines are those of its self_train_ad.py). What had to be inferred is marked so below.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tqdm.auto import tqdm

from hclib.kernels.distances import full_precision, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.methods.funad_inputs import Inputs, Preparation
from hclib.methods.funad_network import Network, balanced_loss, mutual_smoothness, nearest_squared, rescale
from hclib.methods.state import load_state, save_state

BLOCK = 64  # images scored at a time


class FunAD:
    """An adaptor and a multilayer perceptron over patch features; trained without any label.

    A patch is its token joined with the image's token. At every refresh all training images are scored; those whose
    rescaled score is below `bank_threshold` are taken for normal, and a random share of their adapted patches is the
    memory. In each step the distances of a batch's patches to the memory (itself left out) are rescaled within the
    batch; above `label_threshold` a patch is pseudo-anomalous. The loss is the balanced cross entropy plus `smoothness`
    times the mutual smoothness. Defaults are the supplement's, and the program's where that is silent; on a CPU take
    fewer `epochs`, a higher `learning_rate`, `width`, `tokens`, `memory_patches` and `refresh=None`.

    Args:
        epochs: passes over the training images (1500 in the supplement, 200 by default in the program).
        epoch: "last", or "test", the epoch with the best criterion on data that `fit` is given. The paper chooses by
            the test set's labels: an optimistic number that no user of the method can have.
        batch_size: images in a step.
        learning_rate: of RMSprop, with momentum 0.2.
        smoothness: lambda, the weight of the mutual smoothness.
        bank_threshold: tau_b; label_threshold: tau_n (which of the two is which is inferred; both are 0.5).
        certain_threshold: tau_c: patches whose rescaled distance lies between `label_threshold` and this get Gaussian
            noise, with the batch's standard deviation of each channel, before they are scored (scale inferred); 0 for
            no noise.
        memory_ratio: share of the candidates' patches in the memory.
        memory_patches: the most patches in the memory; None for no limit.
        refresh: steps between refreshes, 1 in the program; None for once an epoch. An epoch begins with one.
        tokens: patches of an image in a step, drawn anew; None for all.
        width: principal components of the patches that the network sees; None for all channels.
        hidden: widths of the perceptron's layers.
        synthetic_labels: count the masked patches of synthetic images as anomalous (y_syn, Table 5).
        sigma: Gaussian smoothing of the pixel maps in pixels.
        seed: seeds the network and, with the number of the epoch, every draw.
        checkpoint: folder that holds the state after every epoch; `fit` goes on from there. None for none.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        history: one dict per epoch: `epoch, loss, smoothness, pseudo_anomalous` (share of patches), `candidates` (share
            of images), and, where the index knows labels, `precision` (share of pseudo-anomalous patches that are
            anomalous, in the sense of `truth`) and `memory_purity`; `criterion` where one is given.
    """

    def __init__(
        self,
        *,
        epochs: int = 1500,
        epoch: str = "last",
        batch_size: int = 32,
        learning_rate: float = 2e-5,
        smoothness: float = 2.5,
        bank_threshold: float = 0.5,
        label_threshold: float = 0.5,
        certain_threshold: float = 0.9,
        memory_ratio: float = 0.5,
        memory_patches: int | None = None,
        refresh: int | None = 1,
        tokens: int | None = None,
        width: int | None = None,
        hidden: Sequence[int] = (1024, 128),
        synthetic_labels: bool = True,
        sigma: float = 4.0,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        if epoch not in ("last", "test"):
            raise ValueError(f'epoch={epoch!r}: choose "last" or "test"')
        if epochs < 1 or batch_size < 1 or not 0 < memory_ratio <= 1:
            raise ValueError(f"epochs={epochs}, batch_size={batch_size}, memory_ratio={memory_ratio}: all above 0")
        self.options: dict[str, Any] = {
            "epochs": epochs,
            "epoch": epoch,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "smoothness": smoothness,
            "bank_threshold": bank_threshold,
            "label_threshold": label_threshold,
            "certain_threshold": certain_threshold,
            "memory_ratio": memory_ratio,
            "memory_patches": memory_patches,
            "refresh": refresh,
            "tokens": tokens,
            "width": width,
            "hidden": list(hidden),
            "synthetic_labels": synthetic_labels,
            "sigma": sigma,
            "seed": seed,
        }
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.device = resolve_device(device)
        self.history: list[dict[str, float]] = []
        self.preparation: Preparation | None = None
        self.network: Network | None = None
        self._states: dict[str, dict[str, torch.Tensor]] = {}

    def fit(
        self,
        train: Features,
        labels: Sequence[str] | None = None,
        *,
        validation: Features | None = None,
        criterion: Callable[[Scores], float] | None = None,
        truth: np.ndarray | None = None,
        synthetic: tuple[Features, np.ndarray] | None = None,
        progress: bool = False,
    ) -> Self:
        """Train the network; class names are accepted and ignored.

        Args:
            train: Features of N images, normal and anomalous, unlabelled.
            labels: ignored.
            validation: Features scored after every epoch, for `criterion`; needed for `epoch="test"`.
            criterion: what the best epoch maximises, from the validation scores.
            truth: (N, h, w) bool, the anomalous patches; only the `precision` of the history is computed from it. By
                default a patch counts as anomalous where its image does.
            synthetic: Features of synthetic anomalies and their masks (M, h, w) bool, added to the training images.
            progress: show a progress bar of the epochs.

        Raises:
            ValueError: no training image, `epoch="test"` without validation and criterion, a checkpoint of other data
                or options or with more epochs, shapes that do not fit.
        """
        if self.options["epoch"] == "test" and (validation is None or criterion is None):
            raise ValueError('epoch="test" chooses by labels: give fit() validation= and criterion=, or use "last"')
        if len(train) == 0:
            raise ValueError("no training image: FUN-AD learns from them")
        parts = [train] if synthetic is None else [train, synthetic[0]]
        self.preparation = Preparation.learn(train, self.options["width"], self.options["seed"])
        data = Inputs(parts, self.preparation, self.device)
        known = self._known(train, truth, synthetic, data)
        self.network = Network(data.channels, self.options["hidden"], self.options["seed"]).to(self.device)
        optimizer = torch.optim.RMSprop(self.network.parameters(), lr=self.options["learning_rate"], momentum=0.2)
        fingerprint = self._fingerprint(train, synthetic)
        self.history, self._states = [], {}
        start = self._resume(optimizer, fingerprint)
        rounds = range(start, self.options["epochs"])
        for number in tqdm(rounds, "FUN-AD", disable=not progress, initial=start, total=self.options["epochs"]):
            row = {"epoch": number, **self._epoch(data, known, optimizer, number)}
            self._states["last"] = self.network.copy()
            if validation is not None and criterion is not None:
                row["criterion"] = float(criterion(self.score(validation)))
                if row["criterion"] > max((h["criterion"] for h in self.history), default=-math.inf):
                    self._states["test"] = self._states["last"]
            self.history.append(row)
            self._save_checkpoint(optimizer, fingerprint)
        return self.use(self.options["epoch"])

    def use(self, epoch: str) -> Self:
        """Score with the network of the "last" epoch, or of the best one ("test"), from now on.

        Raises:
            ValueError: that epoch was not kept, because `fit` had no validation data.
        """
        if epoch not in self._states:
            raise ValueError(f"no state for epoch {epoch!r}; there is {sorted(self._states)}: fit with validation data")
        self.network.load_state_dict(self._states[epoch])
        self.options["epoch"] = epoch
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images with the network; no memory is needed. An image's score is its highest patch score.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
        """
        if self.network is None:
            raise RuntimeError("FUN-AD has no network yet: call fit(train) or FunAD.load(folder) first")
        data = Inputs([test], self.preparation, self.device, keep=False)
        patch = self._scores(data).view(len(test), *data.grid).cpu().numpy()
        return Scores(patch, image_scores(patch, "max"), np.zeros(len(patch), np.int64), self.options["sigma"])

    @torch.no_grad()
    def _scores(self, data: Inputs) -> torch.Tensor:
        """Return the scores (N, P) of all patches."""
        blocks = torch.arange(len(data)).split(BLOCK)
        return torch.cat([self.network(data[rows])[1].view(len(rows), -1) for rows in blocks])

    def _epoch(self, data: Inputs, known: dict, optimizer: torch.optim.Optimizer, number: int) -> dict[str, float]:
        """Train on every image once; return the means of what the steps measured."""
        seed = int(np.random.SeedSequence([self.options["seed"], number]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        steps = torch.randperm(len(data), generator=generator).split(self.options["batch_size"])
        rows, memory = [], None
        with full_precision(self.device):
            for step, images in enumerate(steps):
                if step == 0 or (self.options["refresh"] and step % self.options["refresh"] == 0):
                    memory, facts = self._memory(data, known, generator)
                rows.append({**self._step(data, images, memory, known, optimizer, generator), **facts})
        weights = {"precision": np.array([row["pseudo_anomalous"] * row.pop("patches") for row in rows])}
        return {key: _mean([row[key] for row in rows], weights.get(key)) for key in rows[0]}

    def _memory(self, data: Inputs, known: dict, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Draw the memory: (M,) sorted patch numbers of images that score low; and facts about it (:367-417)."""
        image = self._scores(data)[: known["real"]].amax(1)
        images = (rescale(image) < self.options["bank_threshold"]).nonzero()[:, 0].cpu()
        count = max(1, int(len(images) * data.patches * self.options["memory_ratio"]))
        count = min(count, self.options["memory_patches"] or count)
        drawn = torch.randperm(len(images) * data.patches, generator=generator)[:count].sort().values
        memory = images[drawn // data.patches] * data.patches + drawn % data.patches
        purity = math.nan if known["truth"] is None else 1 - known["truth"].flatten()[memory].float().mean().item()
        return memory, {"candidates": len(images) / known["real"], "memory_purity": purity}

    def _step(
        self,
        data: Inputs,
        images: torch.Tensor,
        memory: torch.Tensor,
        known: dict,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """Take one optimisation step on some images; return what was measured."""
        which = _draw(len(images), data.patches, self.options["tokens"], generator)  # (n, t)
        numbers = (images[:, None] * data.patches + which).flatten()  # of the batch's patches
        features = data[images].view(len(images), data.patches, -1)
        features = features[torch.arange(len(images))[:, None], which.to(features.device)].flatten(0, 1)
        adapted = self.network.adapt(features)
        with torch.no_grad():
            place = torch.searchsorted(memory, numbers).clamp(max=len(memory) - 1)
            own = torch.where(memory[place] == numbers, place, -1).to(self.device)
            stored = self.network.adapt(data.at(memory))
            distance = rescale(nearest_squared(adapted, stored, own=own)[0])
            label = distance > self.options["label_threshold"]
            pseudo = label.cpu()
            if known["synthetic"] is not None:
                label = label | known["synthetic"].flatten()[numbers].to(self.device)
            doubtful = (distance > self.options["label_threshold"]) & (distance < self.options["certain_threshold"])
            noise = torch.randn(adapted.shape, generator=generator).to(self.device) * adapted.std(0, correction=0)
        score = self.network.judge(adapted + noise * doubtful[:, None])
        smooth = mutual_smoothness(adapted, score) if self.options["smoothness"] else score.sum() * 0
        loss = balanced_loss(score, label) + self.options["smoothness"] * smooth
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = math.nan if known["truth"] is None else known["truth"].flatten()[numbers[pseudo]].float().mean().item()
        facts = {"loss": loss.item(), "smoothness": smooth.item(), "pseudo_anomalous": pseudo.float().mean().item()}
        return {**facts, "precision": hits, "patches": len(numbers)}

    def _known(
        self, train: Features, truth: np.ndarray | None, synthetic: tuple[Features, np.ndarray] | None, data: Inputs
    ) -> dict[str, Any]:
        """Return what only measures or synthetic images need: patch truth and synthetic masks, (N, P) bool."""
        shape = (len(train), data.patches)
        if truth is None and "label" in train.index:
            truth = np.repeat(train.index["label"].to_numpy()[:, None] == 1, data.patches, axis=1)
        known: dict[str, Any] = {"real": len(train), "truth": None, "synthetic": None}
        if truth is not None:
            known["truth"] = torch.as_tensor(np.reshape(truth, shape))
        if synthetic is not None:
            masks = torch.as_tensor(np.reshape(synthetic[1], (len(synthetic[0]), data.patches)))
            if known["truth"] is not None:
                known["truth"] = torch.cat([known["truth"], masks])
            if self.options["synthetic_labels"]:
                known["synthetic"] = torch.cat([torch.zeros(shape, dtype=torch.bool), masks])
        return known

    def _fingerprint(self, train: Features, synthetic: tuple[Features, np.ndarray] | None) -> str:
        """Return what a checkpoint must agree on: data and options, but for the number of epochs and their choice."""
        digest = hashlib.sha256(np.ascontiguousarray(train.tokens).tobytes())
        if synthetic is not None:
            digest.update(np.ascontiguousarray(synthetic[0].tokens).tobytes() + np.packbits(synthetic[1]).tobytes())
        options = {k: v for k, v in self.options.items() if k not in ("epochs", "epoch", "sigma")}
        digest.update(json.dumps([options, list(train.maps), train.encoder], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _resume(self, optimizer: torch.optim.Optimizer, fingerprint: str) -> int:
        """Load a checkpoint where there is one; return the number of epochs it has seen."""
        if self.checkpoint is None or not (self.checkpoint / "detector.json").is_file():
            return 0
        facts, tensors = load_state(self.checkpoint, "FunAD training")
        if facts["fingerprint"] != fingerprint or len(facts["history"]) > self.options["epochs"]:
            raise ValueError(
                f"{self.checkpoint}: a checkpoint of other data or options, or after {len(facts['history'])} epochs "
                f"where {self.options['epochs']} are asked for; delete it or give another folder"
            )
        self.history = facts["history"]
        for name in facts["states"]:
            self._states[name] = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")}
        self.network.load_state_dict(self._states["last"])
        state = optimizer.state_dict()
        state["state"] = {
            i: {name: tensors[f"optimizer/{i}/{name}"] for name in ("step", "square_avg", "momentum_buffer")}
            for i in range(len(list(self.network.parameters())))
        }
        optimizer.load_state_dict(state)
        return len(self.history)

    def _save_checkpoint(self, optimizer: torch.optim.Optimizer, fingerprint: str) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"{name}/{k}": v.clone() for name, state in self._states.items() for k, v in state.items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v).clone() for k, v in state.items() if v is not None}
        facts = {"fingerprint": fingerprint, "history": self.history, "states": sorted(self._states)}
        save_state(self.checkpoint, "FunAD training", facts, tensors)

    def save(self, folder: str | Path) -> None:
        """Write options and history (JSON), network and preparation (safetensors) to `folder`."""
        if self.network is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        tensors = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"preparation/{k}": v for k, v in self.preparation.tensors().items()}
        save_state(folder, "FunAD", {"options": self.options, "history": self.history}, tensors)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote; its scores are the same bit for bit."""
        facts, tensors = load_state(folder, "FunAD")
        detector = cls(**facts["options"], device=device)
        detector.history = facts["history"]
        part = {p: {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(p)} for p in ("net", "prep")}
        detector.preparation = Preparation(**part["prep"])
        detector.network = Network(detector.preparation.channels, detector.options["hidden"], 0).to(detector.device)
        detector.network.load_state_dict(part["net"])
        detector._states = {detector.options["epoch"]: detector.network.copy()}
        return detector


def _draw(images: int, patches: int, tokens: int | None, generator: torch.Generator) -> torch.Tensor:
    """Return the patches of every image that take part in a step, (n, t) int64."""
    if tokens is None or tokens >= patches:
        return torch.arange(patches).expand(images, -1)
    return torch.rand(images, patches, generator=generator).topk(tokens, dim=1).indices.sort(dim=1).values


def _mean(values: list[float], weights: np.ndarray | None = None) -> float:
    """Return the mean without NaN, weighted where weights are given; NaN where nothing is left."""
    kept = ~np.isnan(values)
    if weights is None:
        weights = np.ones(len(values))
    total = weights[kept].sum()
    return float((np.asarray(values)[kept] * weights[kept]).sum() / total) if total else math.nan
