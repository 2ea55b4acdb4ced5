"""A student network as a detector of its own: the baseline that MeDS is compared with, and what MeDS is built on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from hclib.kernels.distances import full_precision, resolve_device
from hclib.kernels.features import Features
from hclib.kernels.maps import Scores, image_scores
from hclib.methods.quantised_student import HVQStudent
from hclib.methods.state import load_state, save_state
from hclib.methods.students import DinomalyStudent, INPFormerStudent, Student, score_map
from hclib.methods.training import Loss, Recipe, train

STUDENTS: dict[str, type[Student]] = {"dinomaly": DinomalyStudent, "inpformer": INPFormerStudent, "hvq": HVQStudent}
BLOCK = 32  # images scored at a time
KEPT = 1 << 30  # bytes of targets held in memory; beyond, they are read again for every batch


class Targets:
    """What students rebuild: the mean of each group of layers; `targets[rows]` gives (n, G, P, C) float32.

    Means are rounded to half precision, so that it makes no difference whether they are held or read.

    Args:
        features: images whose layers share one grid.
        layers: the encoder's layers, in order; None for all but "norm" (only "norm" where there is nothing else).
        groups: number of groups G; the layers are split evenly, the first ones together.
        device: where targets are given.
        keep: hold the means of all images in memory, up to 1 GB.
    """

    def __init__(
        self,
        features: Features,
        layers: Sequence[str] | None,
        groups: int,
        device: torch.device,
        *,
        keep: bool = True,
    ) -> None:
        layers = list(layers or [layer for layer in features.maps if layer != "norm"] or features.maps)
        shapes = {features.maps[layer].shape[1:] for layer in layers if layer in features.maps}
        if set(layers) - set(features.maps) or len(shapes) != 1:
            raise ValueError(f"layers {layers}: among the features' {list(features.maps)}, with one grid and one width")
        if not 1 <= groups <= len(layers):
            raise ValueError(f"groups={groups}: at least 1, and no more than the {len(layers)} layers")
        self.features, self.device = features, device
        self.parts = [[layers[i] for i in part] for part in np.array_split(np.arange(len(layers)), groups)]
        self.shares = [len(part) for part in self.parts]
        h, w, self.channels = shapes.pop()
        self.grid, self.patches = (h, w), h * w
        self._held: torch.Tensor | None = None
        if keep and len(features) * groups * h * w * self.channels * 2 <= KEPT:
            blocks = np.split(np.arange(len(features)), range(BLOCK, len(features), BLOCK))
            self._held = torch.cat([self._read(rows) for rows in blocks])

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        found = self._read(rows.numpy()) if self._held is None else self._held[rows]
        return found.to(self.device).float()

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the means (n, G, P, C) float16 of image rows, on the CPU."""
        means = []
        for part in self.parts:
            total = sum(torch.from_numpy(np.asarray(self.features.maps[layer][rows], np.float32)) for layer in part)
            means.append((total / len(part)).half().flatten(1, 2))
        return torch.stack(means, 1)


@torch.no_grad()
def score_patches(network: Student, data: Targets) -> torch.Tensor:
    """Return the reconstruction scores (N, P) float32 of all images, on the network's device."""
    network.eval()
    parts = []
    with full_precision(data.device):
        for rows in torch.arange(len(data)).split(BLOCK):
            targets = data[rows]
            parts.append(score_map(network(targets)[0], targets))
    return torch.cat(parts)


def draw_tokens(
    images: int, patches: int, tokens: int | None, generator: torch.Generator, device: torch.device
) -> torch.Tensor | None:
    """Return which patches of every image take part in a step, (n, tokens) ascending; None for all."""
    if tokens is None or tokens >= patches:
        return None
    values = torch.rand(images, patches, generator=generator, device=device)
    return values.topk(tokens, dim=1).indices.sort(dim=1).values


def at_tokens(values: torch.Tensor, which: torch.Tensor | None) -> torch.Tensor:
    """Return targets (n, G, P, C) at patches (n, t): (n, G, t, C); all of them for None."""
    if which is None:
        return values
    return values.gather(2, which[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3]))


class StudentDetector:
    """A student trained on all images as if they were normal; its score is how badly it rebuilds the features.

    Class labels are never used. The defaults are the papers' sizes (batch 16, 10,000 steps, a decoder as wide as the
    encoder, of 8 blocks, or 4 for "hvq"); on a CPU take fewer `steps`, `tokens`, `width` and `depth`. Features should
    hold several layers of one grid (Dinomaly: blocks 3 to 10 of 12).

    Args:
        student: "dinomaly", "inpformer" or "hvq".
        width: channels of the decoder; None for the encoder's.
        depth: blocks of the decoder; None for the student's own.
        network: further options of the student (`dropout`; `prototypes`, `gather`; `codes`, `commitment`).
        layers: layers that are rebuilt; None for all but "norm".
        groups: groups of layers, each rebuilt as its mean.
        tokens: patches of an image in a step, drawn anew; None for all.
        steps: iterations.
        batch_size: images in a step.
        learning_rate: the highest; None for the student's own (2e-3, 1e-3, 1e-4). final_learning_rate: the last; None
            for a tenth.
        optimizer: "stable_adamw" or "adamw".
        warmup: share of the steps with a rising rate.
        weight_decay: decoupled.
        clip: largest norm of the gradient.
        hard_mining: share of positions whose gradient is discounted ("dinomaly" only), 0.9 in its program.
        ramp: share of the steps in which that share rises from 0 (1,000 of 10,000).
        percent: share of the highest patch scores, in percent, whose mean is the image score.
        sigma: Gaussian smoothing of the pixel maps in pixels.
        seed: seeds weights, order, dropout and drawn tokens.
        checkpoint: folder for checkpoints, one inside it for each stage, data and options; `fit` goes on from there.
            None for none.
        every: steps between checkpoints.
        device: "auto", "cpu", "cuda" or a torch device.

    Attributes:
        history: one dict per pass over the images: `stage, step, images, loss`.
    """

    def __init__(
        self,
        *,
        student: str = "dinomaly",
        width: int | None = None,
        depth: int | None = None,
        network: dict[str, Any] | None = None,
        layers: Sequence[str] | None = None,
        groups: int = 2,
        tokens: int | None = None,
        steps: int = 10000,
        batch_size: int = 16,
        learning_rate: float | None = None,
        final_learning_rate: float | None = None,
        optimizer: str = "stable_adamw",
        warmup: float = 0.01,
        weight_decay: float = 1e-4,
        clip: float = 0.1,
        hard_mining: float = 0.9,
        ramp: float = 0.1,
        percent: float = 1.0,
        sigma: float = 4.0,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: int = 200,
        device: str | torch.device = "auto",
    ) -> None:
        if student not in STUDENTS:
            raise ValueError(f"student={student!r}: choose one of {sorted(STUDENTS)}")
        if not 0 <= hard_mining < 1 or not 0 < percent <= 100 or (tokens is not None and tokens < 1):
            raise ValueError(f"hard_mining={hard_mining}, percent={percent}, tokens={tokens}: out of range")
        peak = learning_rate or STUDENTS[student].rates[0]
        self.options: dict[str, Any] = {
            "student": student,
            "width": width,
            "depth": depth,
            "network": dict(network or {}),
            "layers": None if layers is None else list(layers),
            "groups": groups,
            "tokens": tokens,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": peak,
            "final_learning_rate": peak / 10 if final_learning_rate is None else final_learning_rate,
            "optimizer": optimizer,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "clip": clip,
            "hard_mining": hard_mining,
            "ramp": ramp,
            "percent": percent,
            "sigma": sigma,
            "seed": seed,
        }
        self.recipe()  # raises where an option of the training is out of range
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.every, self.device = every, resolve_device(device)
        self.history: list[dict[str, Any]] = []
        self.network: Student | None = None

    def fit(self, train: Features, labels: Sequence[str] | None = None, *, progress: bool = False) -> Self:
        """Train the student on all images; class names are accepted and ignored.

        Args:
            train: Features of N images, whose layers share one grid.
            labels: ignored.
            progress: show a progress bar.

        Raises:
            ValueError: no image, or layers that do not fit.
        """
        data = self._read(train)
        network = self._make(data.channels, data.shares)
        images = torch.arange(len(data))
        loss = self._reconstruction(network, data)
        self.history = self._train(
            "train", network, loss, lambda step: (images, {}), self._fingerprint(train), progress
        )
        self.network = network
        return self

    def score(self, test: Features, labels: Sequence[str] | None = None) -> Scores:
        """Score test images; labels are accepted and ignored.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
        """
        if self.network is None:
            raise RuntimeError(f"{type(self).__name__} has no network yet: call fit(train) or load(folder) first")
        data = Targets(test, self.options["layers"], self.options["groups"], self.device, keep=False)
        patch = score_patches(self.network, data).view(len(test), *data.grid).cpu().numpy()
        image = image_scores(patch, "top", fraction=self.options["percent"] / 100)
        return Scores(patch, image, np.zeros(len(patch), np.int64), self.options["sigma"], align_corners=True)

    def recipe(self, steps: int | None = None) -> Recipe:
        """Return how the network is trained, in `steps` iterations instead of the option's."""
        keys = ["steps", "batch_size", "optimizer", "learning_rate", "final_learning_rate", "warmup", "weight_decay"]
        recipe = {key: self.options[key] for key in [*keys, "clip"]}
        return Recipe(**{**recipe, "steps": steps or recipe["steps"]})

    def save(self, folder: str | Path) -> None:
        """Write options and history (JSON) and the network (safetensors) to `folder`."""
        if self.network is None:
            raise RuntimeError("nothing to save: call fit(train) first")
        shape = {"channels": self.network.channels, "shares": self._shares}
        facts = {"options": self.options, "history": self.history, "shape": shape, **self._more_facts()}
        tensors = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        save_state(folder, type(self).__name__, facts, tensors | self._more_tensors())

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "auto") -> Self:
        """Read a detector that `save` wrote; its scores are the same bit for bit."""
        facts, tensors = load_state(folder, cls.__name__)
        detector = cls(**facts["options"], device=device)
        detector.history = facts["history"]
        detector.network = detector._make(**facts["shape"]).eval()
        detector.network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network/")})
        detector._restore(facts, tensors)
        return detector

    def _read(self, train: Features) -> Targets:
        if len(train) == 0:
            raise ValueError("no training image: a student learns from them")
        return Targets(train, self.options["layers"], self.options["groups"], self.device)

    def _make(self, channels: int, shares: Sequence[int]) -> Student:
        size = {key: self.options[key] for key in ("width", "depth", "seed")}
        self._shares = list(shares)
        return STUDENTS[self.options["student"]](channels, shares, **size, **self.options["network"]).to(self.device)

    def _reconstruction(self, network: Student, data: Targets) -> Loss:
        """Return the student's own loss; the discounted share rises over the first steps."""
        rise = max(1, round(self.options["ramp"] * self.options["steps"]))

        def loss(rows: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
            which = draw_tokens(len(rows), data.patches, self.options["tokens"], generator, data.device)
            targets = at_tokens(data[rows], which)
            outputs, auxiliary = network(targets, generator)
            return network.loss(outputs, targets, self.options["hard_mining"] * min(1, step / rise)) + auxiliary

        return loss

    def _train(
        self,
        stage: str,
        network: Student,
        loss: Loss,
        rows: Any,
        fingerprint: str,
        progress: bool,
        steps: int | None = None,
    ) -> list[dict[str, Any]]:
        """Train one stage, with checkpoints; return its history."""
        history = train(
            network,
            loss,
            rows,
            self.recipe(steps),
            seed=[self.options["seed"], *stage.encode()],
            checkpoint=self._folder(stage, fingerprint),
            every=self.every,
            fingerprint=fingerprint,
            progress=f"{type(self).__name__}, {stage}" if progress else "",
        )
        return [{"stage": stage, **row} for row in history]

    def _fingerprint(
        self, train: Features, labels: Sequence[str] | None = None, without: Sequence[str] = ("sigma",)
    ) -> str:
        """Return what a stage's checkpoint must agree on: data, labels and the options that it depends on."""
        digest = hashlib.sha256(np.ascontiguousarray(train.tokens).tobytes())
        options = {k: v for k, v in self.options.items() if k not in without}
        facts = [
            type(self).__name__,
            options,
            list(train.maps),
            train.encoder,
            None if labels is None else list(labels),
        ]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def _folder(self, stage: str, fingerprint: str) -> Path | None:
        """Return where a stage's checkpoints lie: other data or options have another folder."""
        return None if self.checkpoint is None else self.checkpoint / f"{stage}-{fingerprint[:12]}"

    def _more_facts(self) -> dict[str, Any]:
        return {}

    def _more_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def _restore(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        pass
