"""The memory bank: exact nearest neighbours among stored patch vectors, and its file.

FAISS (exhaustive L2) on the CPU and, where the GPU build of FAISS is installed, on CUDA; the project's own
`nearest` on CUDA otherwise. On a CPU the two are about equally fast: both are one blocked matrix product.
"""

from __future__ import annotations

from functools import cache
from os import PathLike

import faiss
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hclib.kernels.distances import nearest, pair_distances, resolve_device

CHUNK = 16384  # queries per call: bounds FAISS's own buffers


class MemoryBank:
    """M patch vectors that queries are compared with.

    Args:
        points: (M, C) floating point, kept as float32; M >= 1.
        device: where searching happens: "auto", "cpu", "cuda" or a torch device.
        engine: "faiss" or "torch" (`hclib.kernels.distances.nearest`); "auto" is FAISS where it can use the
            device.

    Attributes:
        points: (M, C) float32 on `device`.
        device: torch device.
        engine: "faiss" or "torch".

    Raises:
        ValueError: `points` has another shape, is empty or not finite, or the engine cannot use the device.
    """

    def __init__(self, points: torch.Tensor, device: str | torch.device = "auto", *, engine: str = "auto") -> None:
        self.device = resolve_device(device)
        points = torch.as_tensor(points)
        if points.ndim != 2 or 0 in points.shape or not points.is_floating_point():
            raise ValueError(
                f"points: shape {tuple(points.shape)}, {points.dtype}; expected (M, C) floating point, M >= 1"
            )
        self.points = points.detach().to(self.device, torch.float32).contiguous()
        if not torch.isfinite(self.points).all():
            row = int((~torch.isfinite(self.points)).any(1).nonzero()[0])
            raise ValueError(f"points: row {row} holds NaN or infinity; remove it before building the bank")
        self.engine = _choose_engine(engine, self.device)

    def __len__(self) -> int:
        return len(self.points)

    def search(self, queries: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the `k` nearest stored vectors of every query.

        The engine chooses the neighbours; their distances are then evaluated directly as sum((q - p)^2), so a
        stored vector is at exactly 0 from itself and both engines hand out the same numbers.

        Args:
            queries: (Q, C) floating point, on any device; compared in float32.
            k: neighbours, 1 <= k <= M.

        Returns:
            Squared L2 distances (Q, k) float32, ascending, and indices (Q, k) int64 into `points`, both on
            `device`.

        Raises:
            ValueError: another width than the bank's, k out of range, or NaN or infinity in a query.
        """
        queries = torch.as_tensor(queries)
        if queries.ndim != 2 or queries.shape[1] != self.points.shape[1] or not queries.is_floating_point():
            shape = f"{tuple(queries.shape)}, {queries.dtype}"
            raise ValueError(f"queries: shape {shape}; the bank compares (Q, {self.points.shape[1]}) floating point")
        if not 1 <= k <= len(self):
            raise ValueError(f"k = {k}: must lie between 1 and the {len(self)} vectors of the bank")
        if self.engine == "torch":
            values, indices = nearest(queries.to(self.device), self.points, k)
            return values.square_(), indices
        values = torch.empty(len(queries), k, device=self.device)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=self.device)
        for start in range(0, len(queries), CHUNK):
            part = queries[start : start + CHUNK].detach().to(self.device, torch.float32).contiguous()
            if not torch.isfinite(part).all():
                row = start + int((~torch.isfinite(part)).any(1).nonzero()[0])
                raise ValueError(f"queries: row {row} holds NaN or infinity")
            found = _search_faiss(part, self.points, k)
            exact, order = pair_distances(part, self.points, found).sort(dim=1, stable=True)
            values[start : start + CHUNK], indices[start : start + CHUNK] = exact, found.gather(1, order)
        return values, indices

    def save(self, path: str | PathLike) -> None:
        """Write the points to a safetensors file, bit for bit."""
        save_file({"points": self.points.cpu()}, path, metadata={"kind": "memory bank"})

    @classmethod
    def load(cls, path: str | PathLike, device: str | torch.device = "auto", *, engine: str = "auto") -> MemoryBank:
        """Read a bank that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no safetensors file or holds no points.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
        if "points" not in tensors:
            raise ValueError(f"{path}: holds {sorted(tensors)}, not the points of a memory bank")
        return cls(tensors["points"], device, engine=engine)


def _search_faiss(queries: torch.Tensor, points: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices (Q, k) of the k nearest points, by FAISS's exhaustive search."""
    if points.device.type == "cuda":
        from faiss.contrib import torch_utils  # noqa: F401  (lets the GPU search take torch tensors)

        return faiss.knn_gpu(_gpu_resources(points.device.index or 0), queries, points, k)[1]
    return torch.from_numpy(faiss.knn(queries.numpy(), points.numpy(), k)[1])


@cache
def _gpu_resources(device: int) -> faiss.StandardGpuResources:
    with torch.cuda.device(device):
        return faiss.StandardGpuResources()


def _choose_engine(engine: str, device: torch.device) -> str:
    usable = device.type == "cpu" or (device.type == "cuda" and hasattr(faiss, "StandardGpuResources"))
    if engine == "auto":
        return "faiss" if usable else "torch"
    if engine not in ("faiss", "torch"):
        raise ValueError(f'engine {engine!r}: choose "faiss", "torch" or "auto"')
    if engine == "faiss" and not usable:
        raise ValueError(f'engine "faiss" cannot use {device}: install the GPU build of FAISS or choose "torch"')
    return engine
