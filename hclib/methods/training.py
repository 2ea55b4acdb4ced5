"""One small training loop: StableAdamW or AdamW, warm-up and cosine, clipped gradients, checkpoints, exact resume.

A run that was killed and started again with the same checkpoint folder ends in the same weights, bit for bit, on the
same machine: weights, optimiser, generators, the order of the images and the place in it are all stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from hclib.kernels.distances import full_precision
from hclib.methods.state import load_state, save_state

Loss = Callable[[torch.Tensor, int, torch.Generator], torch.Tensor]
Rows = Callable[[int], tuple[torch.Tensor, dict[str, Any]]]


def warm_cosine(step: int, steps: int, peak: float, final: float, warmup: int) -> float:
    """Return the learning rate of a step (from 0): linear from 0 to `peak`, then a half cosine towards `final`.

    Source: Dinomaly's program, utils.py:775 (the first step has rate 0).
    """
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose step shrinks for a tensor where the gradient is large beside its running mean square.

    Decay comes first; with amsgrad the running maximum of the second moment is used; the rate of a tensor is divided by
    max(1, RMS(gradient / denominator) / threshold).

    Args:
        params: parameters.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: keep the maximum of the second moment.
        threshold: of the root mean square.

    Source: Wortsman et al., "Stable and low-precision training" (NeurIPS 2023), algorithm 2, in the form that
    Dinomaly's program uses (StableAdamW.py:78-130), whose settings are the defaults.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 1e-4,
        amsgrad: bool = True,
        threshold: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "amsgrad": amsgrad, "threshold": threshold})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step on every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[weight], group["betas"]
        if not state:
            state |= {"step": torch.tensor(0.0), "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
            state["largest"] = torch.zeros_like(weight)
        state["step"] += 1
        count = state["step"].item()
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        state["mean"].mul_(first).add_(gradient, alpha=1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        torch.maximum(state["largest"], state["square"], out=state["largest"])
        moment = state["largest"] if group["amsgrad"] else state["square"]
        denominator = (moment.sqrt() / math.sqrt(1 - second**count)).add_(group["eps"])
        ratio = (gradient / denominator).square().mean().sqrt().item() / group["threshold"]
        weight.addcdiv_(state["mean"], denominator, value=-group["lr"] / (1 - first**count) / max(1.0, ratio))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are Dinomaly's.

    Attributes:
        steps: iterations T.
        batch_size: images in a step; the last step of a pass may have fewer.
        optimizer: "stable_adamw" or "adamw" (torch's, betas 0.9 and 0.999).
        learning_rate: the peak; final_learning_rate: at the end.
        warmup: share of the steps in which the rate rises from 0 (100 of 10,000).
        weight_decay: decoupled.
        clip: largest norm of the gradient.
    """

    steps: int = 10000
    batch_size: int = 16
    optimizer: str = "stable_adamw"
    learning_rate: float = 2e-3
    final_learning_rate: float = 2e-4
    warmup: float = 0.01
    weight_decay: float = 1e-4
    clip: float = 0.1

    def __post_init__(self) -> None:
        if self.optimizer not in ("stable_adamw", "adamw"):
            raise ValueError(f'optimizer={self.optimizer!r}: choose "stable_adamw" or "adamw"')
        if self.steps < 1 or self.batch_size < 1 or self.learning_rate <= 0 or self.clip <= 0:
            values = f"steps={self.steps}, batch_size={self.batch_size}, learning_rate={self.learning_rate}"
            raise ValueError(f"{values}, clip={self.clip}: all above 0")

    def make(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of these weights."""
        kind = StableAdamW if self.optimizer == "stable_adamw" else torch.optim.AdamW
        return kind(weights, lr=self.learning_rate, weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        warmup = round(self.warmup * self.steps)
        return warm_cosine(step, self.steps, self.learning_rate, self.final_learning_rate, warmup)


class Run:
    """A network in training, and all that its next step depends on."""

    def __init__(self, network: nn.Module, recipe: Recipe, seed: int | list[int]) -> None:
        self.network, self.recipe = network, recipe
        self.optimizer = recipe.make(network.parameters())
        device = next(network.parameters()).device
        seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(2)]
        self.generators = [torch.Generator().manual_seed(seeds[0]), torch.Generator(device).manual_seed(seeds[1])]
        self.step, self.order, self.place = 0, torch.zeros(0, dtype=torch.int64), 0
        self.history: list[dict[str, Any]] = []

    def advance(self, loss: Loss, rows: Rows) -> None:
        """Take one step; a pass over the images that `rows` names begins where the last one ended."""
        if self.place >= len(self.order):
            images, facts = rows(self.step)
            if len(images) == 0:
                raise ValueError(f"step {self.step}: no image to train on")
            self.order = images[torch.randperm(len(images), generator=self.generators[0])]
            self.place = 0
            self.history.append({"step": self.step, "images": len(images), "loss": 0.0, **facts})
        batch = self.order[self.place : self.place + self.recipe.batch_size]
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.network.train()
        value = loss(batch, self.step, self.generators[1])
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self.optimizer.step()
        number = value.item()
        if not math.isfinite(number):
            raise FloatingPointError(f"step {self.step}: the loss is {number}; lower the learning rate")
        self.place += len(batch)
        self.step += 1
        row = self.history[-1]  # the mean over the images seen so far in this pass
        row["loss"] += (number - row["loss"]) * len(batch) / self.place

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write a checkpoint to one of two places in turn, so that a kill while writing leaves the other."""
        tensors = {f"network/{k}": v for k, v in self.network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors |= {f"generator/{i}": generator.get_state() for i, generator in enumerate(self.generators)}
        tensors["order"] = self.order
        tensors = {k: v.detach().clone() for k, v in tensors.items()}
        facts = {"fingerprint": fingerprint, "step": self.step, "place": self.place, "history": self.history}
        held = {place: _step_of(folder / place) for place in ("a", "b")}
        save_state(folder / min(held, key=held.get), "training", facts, tensors)

    def resume(self, folder: Path, fingerprint: str) -> None:
        """Go on from the newest checkpoint in `folder`, where there is one.

        Raises:
            ValueError: it belongs to other data or options.
        """
        held = {place: _step_of(folder / place) for place in ("a", "b")}
        newest = max(held, key=held.get)
        if held[newest] < 0:
            return
        facts, tensors = load_state(folder / newest, "training")
        if facts["fingerprint"] != fingerprint:
            raise ValueError(f"{folder}: a checkpoint of other data or options; delete it or give another folder")
        self.step, self.place, self.history = facts["step"], facts["place"], facts["history"]
        self.order = tensors["order"]
        self.network.load_state_dict(_part(tensors, "network/"))
        state, stored = self.optimizer.state_dict(), _part(tensors, "optimizer/")
        numbers = sorted({int(name.split("/")[0]) for name in stored})
        state["state"] = {number: _part(stored, f"{number}/") for number in numbers}
        self.optimizer.load_state_dict(state)
        for number, generator in enumerate(self.generators):
            generator.set_state(tensors[f"generator/{number}"])


def train(
    network: nn.Module,
    loss: Loss,
    rows: Rows,
    recipe: Recipe,
    *,
    seed: int | list[int] = 0,
    checkpoint: str | Path | None = None,
    every: int = 200,
    fingerprint: str = "",
    progress: str = "",
) -> list[dict[str, Any]]:
    """Train a network in place.

    Args:
        network: on its device; `loss` calls it.
        loss: of the images (n,) int64, the step and a generator on the network's device, for all its random numbers.
        rows: gives, for the step at which a pass begins, the images of the pass and facts for the history.
        recipe: steps, batch, optimiser.
        seed: of the order of the images and of what `loss` draws.
        checkpoint: folder of the checkpoints, or None. A run that is complete there is only read.
        every: steps between checkpoints; one is written at the end, too.
        fingerprint: of the data and options; a checkpoint with another one is refused.
        progress: title of a progress bar; "" for none.

    Returns:
        One dict per pass: `step` it began at, `images`, mean `loss`, and the facts of `rows`.

    Raises:
        ValueError: a checkpoint of other data or options, or a pass without images.
        FloatingPointError: the loss is not finite.
    """
    run = Run(network, recipe, seed)
    fingerprint = json.dumps([fingerprint, asdict(recipe), seed], sort_keys=True)
    if checkpoint is not None:
        run.resume(Path(checkpoint), fingerprint)
    device = next(network.parameters()).device
    with full_precision(device):
        for step in tqdm(range(run.step, recipe.steps), progress, initial=run.step, disable=not progress):
            run.advance(loss, rows)
            if checkpoint is not None and ((step + 1) % every == 0 or step + 1 == recipe.steps):
                run.save(Path(checkpoint), fingerprint)
    network.eval()
    return run.history


def _step_of(folder: Path) -> int:
    """Return the step of a checkpoint, -1 where there is none."""
    path = folder / "detector.json"
    return json.loads(path.read_text())["options"]["step"] if path.is_file() else -1


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
