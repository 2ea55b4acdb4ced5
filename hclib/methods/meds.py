"""MeDS: a student trained on what a sparse memory, and then the student itself, take for normal.

After Safarov et al., "Memory-Distilled Selection for Noise-Robust Anomaly Detection" (ICML 2026), algorithm 1 and
appendix B. Stage 1 (in `meds_memory`) scores every training patch under many sparse memories, stage 2 trains a student
whose reconstruction error imitates those scores, stage 3 trains it on the images that score low, chosen anew after each
pass. The authors' program differs in places; each is an option, and `PROGRAM` sets them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from hclib.kernels.clustering import semantic_clusters
from hclib.kernels.features import Features
from hclib.methods.meds_memory import (
    BootstrappedMemory,
    bootstrap_limit,
    bootstrap_scores,
    draw_images,
    memory_layers,
    memory_patches,
    memory_scores,
)
from hclib.methods.state import load_state, save_state
from hclib.methods.student_detector import StudentDetector, Targets, at_tokens, draw_tokens, score_patches
from hclib.methods.students import Student, score_map
from hclib.methods.training import Loss

__all__ = [
    "PROGRAM",
    "BootstrappedMemory",
    "MeDS",
    "bootstrap_limit",
    "bootstrap_scores",
    "draw_images",
    "robust_maximum",
    "selection_threshold",
]

PROGRAM = {"k": 3.0, "rounding": "floor", "select_at_start": True, "distill_loss": "mse", "hard_mining": 0.5}
"""Options with which MeDS does as its authors' program, where that differs from algorithm 1."""

STAGES = ("memory", "distilled", "final")
SELECTING = (
    "k",
    "rounding",
    "select_at_start",
    "initialise",
    "criterion",
    "selection",
    "hard_mining",
    "ramp",
    "percent",
)
TRAINING = ("student", "width", "depth", "network", "layers", "groups", "tokens", "batch_size", "learning_rate")
TRAINING += ("final_learning_rate", "optimizer", "warmup", "weight_decay", "clip", "distill_steps", "distill_loss")


def selection_threshold(scores: torch.Tensor | np.ndarray, k: float) -> float:
    """Return median + k * MAD, the score below which an image is selected (Eq. 12).

    The median of an even number of values is the mean of the middle two; MAD is the median of the absolute deviations
    from the median, without a factor.

    Args:
        scores: (N,) floating point.
        k: critical value.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    scores = scores.detach().cpu() if isinstance(scores, torch.Tensor) else scores
    values = np.asarray(scores, dtype=np.float64).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"{values.size} scores, {int((~np.isfinite(values)).sum())} not finite: no median")
    median = np.median(values)
    return float(median + k * np.median(np.abs(values - median)))


def robust_maximum(patch: torch.Tensor, percent: float = 1.0, rounding: str = "ceil") -> torch.Tensor:
    """Return the mean of an image's highest patch scores (Eq. 13).

    Args:
        patch: (N, P) floating point.
        percent: share n of the patches, in percent; at least one patch counts.
        rounding: "ceil" (Eq. 13: 8 of 784) or "floor" (the program: 7).

    Returns:
        (N,) of the dtype of `patch`.
    """
    if rounding not in ("ceil", "floor") or not 0 < percent <= 100:
        raise ValueError(f'percent={percent}, rounding={rounding!r}: in (0, 100], and "ceil" or "floor"')
    exact = round(percent * patch.shape[1] / 100, 9)
    count = max(1, math.ceil(exact) if rounding == "ceil" else math.floor(exact))
    return patch.topk(count, dim=1).values.mean(1)


class MeDS(StudentDetector):
    """Bootstrapped memories, their distillation into a student, and training on what the student selects.

    The paper takes class labels as known in training: memories and thresholds are per class. Give them to `fit` as
    `labels`. Without them all training images are one group, which suits a single product; `grouping="finch"` makes
    groups of FINCH's clusters of the image tokens instead, for several products (ours; a cluster may hold anomalies
    alone, and then they pass for normal).

    Args:
        student: "dinomaly", "inpformer" or "hvq".
        ratio: share of a group's images in a memory.
        ensembles: memories B; None for infinitely many (`bootstrap_limit`; ours).
        replacement: draw a memory's images with replacement, as the program does for MVTec AD and VisA.
        memory_layers: layers that memories compare; None for "norm" where there is one (as the program), else all.
        memory_distance: "cosine", 1 - cos of normalised patches (the program, and the unit of a student's score), or
            "l2" (Eq. 1).
        distill_steps: iterations of stage 2; None for `steps`.
        distill_loss: "norm", the L2 norm of a map's error (Eq. 9), or "mse", 10 times its mean square (the program).
        k: final critical value, 1 in the paper, 3 by default in the program.
        rounding: of the number of patches in the robust maximum, "ceil" (paper) or "floor" (program).
        select_at_start: select before the first pass too (program: the half below the median); False trains the first
            pass on all images (algorithm 1, S_0 = D).
        passes: passes over the selected images before the next selection, which scores all patches of all images; 1
            in the paper, more on a CPU.
        initialise: "distilled" (stage 3 goes on with stage 2's student) or "random" (Tables 4 and 5, row 5).
        criterion: what takes the place of the distilled student's score in Eq. 11: "distilled" or "memory" (row 4).
        selection: False ends after stage 2 (row 3).
        grouping: "one" or "finch", where `fit` gets no labels.
        hard_mining: final share of discounted positions in stage 3 ("dinomaly" only): 0.5, appendix B.2; 0 is
            algorithm 1 to the letter.
        percent: n of the robust maximum, also of the image score.
        training: further options of `StudentDetector`.

    Attributes:
        history: one dict per pass: `stage` ("distill", "select"), `step, images, loss`; in stage 3 `alpha, k` and,
            where the index knows labels, `precision`, the normal share of the selected images, and `recall`, the
            selected share of the normal ones.
        groups: (N,) group of every training image.
        selection_scores: (N,) for "memory", "distilled", "final": robust maximum of each stage's training scores.
        selected: (N,) bool, the images whose final score is below the final threshold.
    """

    def __init__(
        self,
        *,
        student: str = "dinomaly",
        ratio: float = 0.1,
        ensembles: int | None = 100,
        replacement: bool = True,
        memory_layers: Sequence[str] | None = None,
        memory_distance: str = "cosine",
        distill_steps: int | None = None,
        distill_loss: str = "norm",
        k: float = 1.0,
        rounding: str = "ceil",
        select_at_start: bool = False,
        passes: int = 1,
        initialise: str = "distilled",
        criterion: str = "distilled",
        selection: bool = True,
        grouping: str = "one",
        hard_mining: float = 0.5,
        percent: float = 1.0,
        **training: Any,
    ) -> None:
        super().__init__(student=student, hard_mining=hard_mining, percent=percent, **training)
        choices = {
            "memory_distance": (memory_distance, ("cosine", "l2")),
            "distill_loss": (distill_loss, ("norm", "mse")),
            "rounding": (rounding, ("ceil", "floor")),
            "initialise": (initialise, ("distilled", "random")),
            "criterion": (criterion, ("distilled", "memory")),
            "grouping": (grouping, ("one", "finch")),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{name}={value!r}: choose one of {known}")
        self.options |= {name: value for name, (value, _) in choices.items()}
        self.options |= {"ratio": ratio, "ensembles": ensembles, "replacement": replacement, "k": k}
        self.options |= {"memory_layers": None if memory_layers is None else list(memory_layers)}
        self.options |= {"distill_steps": distill_steps, "select_at_start": select_at_start, "selection": selection}
        self.options |= {"passes": passes}
        self.groups = np.zeros(0, np.int64)
        self.selection_scores: dict[str, np.ndarray] = {}
        self.selected = np.zeros(0, bool)
        self._names: list[str] = []

    def fit(self, train: Features, labels: Sequence[str] | None = None, *, progress: bool = False) -> Self:
        """Run the three stages.

        Args:
            train: Features of N images, normal and anomalous, unlabelled; layers share one grid.
            labels: class name of every image; None for one group, or FINCH's (`grouping`).
            progress: show progress bars.

        Raises:
            ValueError: no image, labels of another length, or layers that do not fit.
        """
        data, self.groups = self._read(train), self._group(train, labels)
        self._names = [Path(path).name for path in train.index["path"]]
        unneeded = {"distill": ("sigma", *SELECTING), "select": ("sigma",)}
        unneeded["memory"] = (*unneeded["distill"], *TRAINING, "steps")  # stages 1 and 2 serve every kind of selection
        prints = {stage: self._fingerprint(train, labels, without) for stage, without in unneeded.items()}
        memory = self._memory(train, prints["memory"]).to(self.device)  # (N, P)
        network = self._make(data.channels, data.shares)
        images, steps = torch.arange(len(data)), self.options["distill_steps"] or self.options["steps"]
        loss = self._distillation(network, data, memory)
        self.history = self._train("distill", network, loss, lambda _: (images, {}), prints["distill"], progress, steps)
        self.selection_scores = {"memory": self._image(memory), "distilled": self._image(score_patches(network, data))}
        if self.options["selection"]:
            if self.options["initialise"] == "random":
                network = self._make(data.channels, data.shares)
            loss, chooser = self._reconstruction(network, data), self._chooser(network, data, train)
            self.history += self._train("select", network, loss, chooser, prints["select"], progress)
        self.network = network
        self.selection_scores["final"] = self._image(score_patches(network, data))
        self.selected = self._select(self.selection_scores["final"], self.options["k"])
        return self

    def rank_for_review(self, index: pd.DataFrame, *, stage: str = "final", by: str = "excess") -> pd.DataFrame:
        """Rank the training images for a reviewer, the worst first (active label correction, section 5.5).

        Args:
            index: index frame of the images that `fit` saw, in the same order.
            stage: whose scores: "memory", "distilled" or "final" (at the end, Eq. 11 is the student's own score).
            by: "excess", (score - median) / MAD of the image's group, the critical value at which it would be
                selected, comparable between groups; or "score". Within a group both give the same order.

        Returns:
            The index frame in the order of review, with `row` (place in `index`), `group`, `score`, `excess` and
            `selected`.

        Raises:
            RuntimeError: if the detector was not fitted or loaded.
            ValueError: an index of other images, or an unknown `stage` or `by`.
        """
        if not self.selection_scores:
            raise RuntimeError("MeDS has not seen training images yet: call fit(train) or MeDS.load(folder) first")
        if stage not in STAGES or by not in ("excess", "score"):
            raise ValueError(f'stage={stage!r}, by={by!r}: choose one of {STAGES}, and "excess" or "score"')
        if [Path(path).name for path in index["path"]] != self._names:
            raise ValueError(f"the index has {len(index)} images, or others than the {len(self._names)} of fit(train)")
        scores, excess = self.selection_scores[stage].astype(np.float64), np.zeros(len(self.groups))
        for group in np.unique(self.groups):
            mine = self.groups == group
            median = selection_threshold(scores[mine], 0)
            spread = selection_threshold(scores[mine], 1) - median
            excess[mine] = (scores[mine] - median) / max(spread, 1e-12)
        columns = {"row": np.arange(len(index)), "group": self.groups, "score": scores, "excess": excess}
        table = index.reset_index(drop=True).assign(**columns, selected=self.selected)
        table = table.sort_values([by, "row"], ascending=[False, True], ignore_index=True)
        table.attrs = dict(index.attrs)  # the data set's name decides which pixels may be shown
        return table

    def _group(self, train: Features, labels: Sequence[str] | None) -> np.ndarray:
        """Return the group (N,) of every image: its class, its cluster, or 0."""
        if labels is not None:
            if len(labels) != len(train):
                raise ValueError(f"{len(labels)} labels for {len(train)} training images")
            return np.unique(np.asarray(list(labels), dtype=str), return_inverse=True)[1].astype(np.int64)
        if self.options["grouping"] == "finch":
            return np.asarray(semantic_clusters(train.tokens).labels, dtype=np.int64)
        return np.zeros(len(train), np.int64)

    def _memory(self, train: Features, fingerprint: str) -> torch.Tensor:
        """Return stage 1's scores (N, P) of the training patches, group by group; kept beside the checkpoints."""
        folder = self._folder("memory", fingerprint)
        if folder is not None and (folder / "detector.json").is_file():
            return load_state(folder, "MeDS memory")[1]["scores"]
        layers, parts = memory_layers(train, self.options["memory_layers"]), {}
        keys = ("ratio", "ensembles", "seed", "replacement")
        options = {key: self.options[key] for key in keys} | {"distance": self.options["memory_distance"]}
        for group in np.unique(self.groups):
            rows = np.flatnonzero(self.groups == group)
            patches = memory_patches(train, rows, layers).to(self.device)
            parts[group] = rows, memory_scores(patches, patches, **options).cpu()
        scores = torch.empty(len(train), next(iter(parts.values()))[1].shape[1])
        for rows, values in parts.values():
            scores[torch.from_numpy(rows)] = values
        if folder is not None:
            save_state(folder, "MeDS memory", {"fingerprint": fingerprint}, {"scores": scores})
        return scores

    def _distillation(self, network: Student, data: Targets, memory: torch.Tensor) -> Loss:
        """Return stage 2's loss (Eq. 9), with the student's auxiliary one."""

        def loss(rows: torch.Tensor, step: int, generator: torch.Generator) -> torch.Tensor:
            which = draw_tokens(len(rows), data.patches, self.options["tokens"], generator, data.device)
            wanted = memory[rows.to(memory.device)]
            targets = at_tokens(data[rows], which)
            outputs, auxiliary = network(targets, generator)
            error = score_map(outputs, targets) - (wanted if which is None else wanted.gather(1, which))
            if self.options["distill_loss"] == "mse":
                return 10 * error.square().mean() + auxiliary
            return torch.linalg.vector_norm(error, dim=1).mean() + auxiliary

        return loss

    def _chooser(self, network: Student, data: Targets, train: Features) -> Any:
        """Return what names the images of stage 3's next pass: all at first (S_0 = D), then Eqs. 11 and 12."""
        initial, total = self.selection_scores[self.options["criterion"]], self.options["steps"]
        truth = train.index["label"].to_numpy() == 1 if "label" in train.index else None
        early = self.options["select_at_start"]

        def rows(done: int) -> tuple[torch.Tensor, dict[str, Any]]:
            time = (done if early else done + 1) / total  # algorithm 1 counts iterations from 1, the program from 0
            alpha, k = min(2 * time, 1.0), self.options["k"] * time
            chosen = np.ones(len(data), bool)
            if done or early:
                current = self._image(score_patches(network, data)) if alpha else initial
                chosen = self._select((1 - alpha) * initial + alpha * current, k)
            facts: dict[str, Any] = {"images": chosen.sum(), "alpha": alpha, "k": k}
            if truth is not None:
                good = chosen & ~truth
                facts |= {"precision": good.sum() / chosen.sum(), "recall": good.sum() / max(1, (~truth).sum())}
            images = torch.from_numpy(np.flatnonzero(chosen)).repeat(self.options["passes"])
            return images, {key: int(v) if key == "images" else float(v) for key, v in facts.items()}

        return rows

    def _select(self, scores: np.ndarray, k: float) -> np.ndarray:
        """Return the images (N,) bool whose score is below their group's threshold; at it, where none is below."""
        chosen = np.zeros(len(scores), bool)
        for group in np.unique(self.groups):
            mine = self.groups == group
            limit = selection_threshold(scores[mine], k)
            below = scores[mine] < limit
            chosen[mine] = below if below.any() else scores[mine] <= limit
        return chosen

    def _image(self, patch: torch.Tensor) -> np.ndarray:
        """Return the robust maxima (N,) float64 of patch scores (N, P)."""
        return robust_maximum(patch.double(), self.options["percent"], self.options["rounding"]).cpu().numpy()

    def _more_facts(self) -> dict[str, Any]:
        return {"names": self._names}

    def _more_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"scores/{name}": torch.from_numpy(values) for name, values in self.selection_scores.items()}
        return tensors | {"groups": torch.from_numpy(self.groups), "selected": torch.from_numpy(self.selected)}

    def _restore(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self._names = facts["names"]
        self.selection_scores = {name: tensors[f"scores/{name}"].numpy() for name in STAGES}
        self.groups, self.selected = tensors["groups"].numpy(), tensors["selected"].numpy()
