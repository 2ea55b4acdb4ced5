"""A fitted detector on disk: options as JSON, tensors as safetensors, nothing that executes on reading."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_state(folder: str | Path, kind: str, options: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write `folder`/detector.json and `folder`/tensors.safetensors, aside first and then renamed.

    Args:
        folder: where to write; an earlier detector there is replaced.
        kind: class name, checked by `load_state`.
        options: JSON-plain keyword options of the class.
        tensors: named tensors.

    Raises:
        FileExistsError: if `folder` exists and holds something other than a detector.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "detector.json").is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files and no detector.json: choose an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside / "tensors.safetensors")
        (aside / "detector.json").write_text(json.dumps({"kind": kind, "options": options}, indent=1, sort_keys=True))
        os.chmod(aside, 0o755)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_state(folder: str | Path, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read what `save_state` wrote and check that it is a `kind`.

    Raises:
        FileNotFoundError: if `folder` holds no detector.
        ValueError: if it holds another kind of detector.
    """
    path = Path(folder) / "detector.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder that {kind}.save(folder) wrote")
    state = json.loads(path.read_text())
    if state["kind"] != kind:
        raise ValueError(f"{path} holds a {state['kind']}, not a {kind}: load it with {state['kind']}.load")
    return state["options"], load_file(Path(folder) / "tensors.safetensors")
