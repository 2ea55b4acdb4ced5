"""The one distance kernel: blocked GEMM on centred float32 vectors, near distances evaluated again directly.

|q - b|^2 = |q|^2 + |b|^2 - 2 q.b costs one matrix product but cancels badly for near neighbours. The matrix
product therefore only *chooses* candidates; the values that are handed out come from sum((q - b)^2), so a
point that is in the bank has distance exactly 0. The choice itself can only miss a neighbour by less than the
rounding of the product (about 1e-6 of the squared norms after centring), and not even by that unless many
bank vectors tie that closely.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

CHUNK = 64  # columns whose minimum is taken together: a minimum is vectorised, an arg-minimum is not
SPARE = 7  # candidates kept beyond k, so that near-ties are settled by the direct distance
DOUBT = 2.0**-18  # bound on the rounding of the product, relative to the squared norms
NEAR = 0.01  # patch_to_image: minima below this part of the squared norms are evaluated again directly

PAIR_VALUES = 1 << 22  # values of gathered vectors held at a time: 16 MB


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device that `device` means here; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: `device` is not a device name, or names a CUDA device that this machine does not have.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r}: not a device; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise ValueError(f"device {device!r}: this machine has {count} usable CUDA devices; use 'auto' or 'cpu'")
    return resolved


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `k` nearest vectors of a bank for every query, in L2.

    Works in blocks: beside its arguments it holds about 100 MB on a CPU (1 GB on CUDA) and k + 7 candidates a
    query. Equally distant neighbours come in the order of their index; which of more than k + 7 exact
    duplicates are named is open.

    Args:
        queries: (Q, C) floating point, any precision; compared in float32.
        bank: (M, C) on the same device.
        k: neighbours to return, 1 <= k <= M.

    Returns:
        `values` (Q, k) float32, L2 distances in ascending order, and `indices` (Q, k) int64 into `bank`.

    Raises:
        ValueError: a shape, dtype or device does not fit, the bank is empty, k is not in 1..M, or a vector
            holds NaN, infinity or a value too large to square in float32 (the row is named).
    """
    queries, bank = _vectors(queries, "queries", 2), _vectors(bank, "bank", 2)
    _comparable(queries, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k}: must lie between 1 and the {len(bank)} vectors of the bank")
    with torch.no_grad(), full_precision(queries.device):
        keep = min(k + SPARE, len(bank))
        squared, indices, scale = _candidates(queries, bank, keep)
        return _settle(queries, bank, squared, indices, scale, k)


def pair_distances(queries: torch.Tensor, bank: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Measure given pairs directly, as sum((q - b)^2): squared L2, without the cancellation of a product.

    Args:
        queries: (Q, C) floating point.
        bank: (M, C) floating point.
        indices: (Q, k) int64 into `bank`.

    Returns:
        (Q, k) float32, squared L2.
    """
    step = max(1, PAIR_VALUES // (indices.shape[1] * queries.shape[1]))
    result = torch.empty(indices.shape, device=queries.device)
    for part in (slice(start, start + step) for start in range(0, len(queries), step)):
        result[part] = _squared(queries[part, None], bank[indices[part]])
    return result


def patch_to_image(queries: torch.Tensor, references: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Measure how far every query patch is from its nearest patch in each reference image, in L2.

    Works in blocks of images (about 100 MB on a CPU, 1 GB on CUDA), so half-precision or memory-mapped arrays
    are never converted whole. When `references` is the very tensor `queries`, each pair of images is
    multiplied once and read in both directions. A patch found again in a reference image is at exactly 0;
    other distances are off by the rounding of the product (relative 1e-4 at worst, 1e-6 as a rule).

    Args:
        queries: (Nq, P, C) floating point, any precision; compared in float32.
        references: (Nr, R, C) on the same device; R may differ from P.
        out: (Nq, P, Nr) to write into, on any device (a memory map, for one) instead of a new tensor.

    Returns:
        (Nq, P, Nr) float32 on the device of `queries`, or `out`.

    Raises:
        ValueError: a shape, dtype or device does not fit, there is no reference patch, or a vector holds NaN,
            infinity or a value too large to square in float32 (the image is named).
    """
    same = references is queries
    queries, references = _vectors(queries, "queries", 3), _vectors(references, "references", 3)
    _comparable(queries, references, "references")
    shape = (len(queries), queries.shape[1], len(references))
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=queries.device)
    elif out.shape != shape:
        raise ValueError(f"out: shape {tuple(out.shape)}; the result has shape {shape}")
    rows, columns = _image_block(queries.device)
    high, wide = max(1, rows // max(1, shape[1])), max(1, columns // references.shape[1])
    with torch.no_grad(), full_precision(queries.device):
        centre = centre_of(references[:64].flatten(0, 1))
        for top in range(0, len(queries), high):
            left = _ImageBlock(queries, slice(top, top + high), centre, "queries")
            for start in range(top if same else 0, len(references), wide):
                right = _ImageBlock(references, slice(start, start + wide), centre, "references")
                squared = _pairwise(left, right)  # (high, P, wide, R)
                out[left.images, :, right.images] = _settle_minima(squared.amin(3), squared, left, right)
                if same:
                    back = squared.amin(1).permute(1, 2, 0)  # (wide, R, high)
                    out[right.images, :, left.images] = _settle_minima(back, squared.permute(2, 3, 0, 1), right, left)
    return out


class _ImageBlock:
    """A few images' patches in float32, their centred copies and squared norms."""

    def __init__(self, source: torch.Tensor, images: slice, centre: torch.Tensor, name: str) -> None:
        self.images = images
        self.patches = source[images].float()  # (n, P, C)
        self.centred = self.patches - centre
        self.norms = torch.linalg.vecdot(self.centred, self.centred)  # (n, P)
        if not torch.isfinite(self.norms).all():
            image, patch = (~torch.isfinite(self.norms)).nonzero()[0].tolist()
            raise ValueError(
                f"{name}: patch {patch} of image {images.start + image} holds NaN, infinity or values "
                "too large to square; remove or fix it"
            )


def _pairwise(left: _ImageBlock, right: _ImageBlock) -> torch.Tensor:
    """Return approximate squared distances between all patches, (n_left, P, n_right, R)."""
    rows, columns = left.centred.flatten(0, 1), right.centred.flatten(0, 1)
    squared = torch.addmm(right.norms.flatten(), rows, columns.T, alpha=-2)
    squared.add_(left.norms.view(-1, 1))
    return squared.view(*left.norms.shape, *right.norms.shape)


def _settle_minima(least: torch.Tensor, squared: torch.Tensor, left: _ImageBlock, right: _ImageBlock) -> torch.Tensor:
    """Return the square roots of `least` (n_left, P, n_right), small ones directly from four candidates."""
    near = least <= NEAR * (left.norms[:, :, None] + right.norms.amax(1))
    for part in near.nonzero().split(4096):
        a, p, b = part.T
        best = squared[a, p, b].topk(min(4, squared.shape[3]), dim=1, largest=False).indices  # (n, 4)
        least[a, p, b] = _squared(left.patches[a, p][:, None], right.patches[b[:, None], best]).amin(1)
    return least.clamp_(min=0).sqrt_()


def _candidates(
    queries: torch.Tensor, bank: torch.Tensor, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the `keep` smallest approximate squared distances (Q, keep), their indices, the largest norm."""
    rows, columns = _block_shape(queries.device, len(bank))
    centre = centre_of(bank)
    best = queries.new_full((len(queries), keep), torch.inf, dtype=torch.float32)
    indices = torch.zeros((len(queries), keep), dtype=torch.int64, device=queries.device)
    product = torch.empty(min(rows, len(queries)), columns, device=queries.device)
    largest = torch.zeros((), device=queries.device)
    for start in range(0, len(bank), columns):
        block, norms = _centred(bank, start, columns, centre, "bank")
        largest = torch.maximum(largest, norms.amax())
        if len(block) < columns:  # fill the block up with vectors that are infinitely far away
            block = torch.nn.functional.pad(block, (0, 0, 0, columns - len(block)))
            norms = torch.nn.functional.pad(norms, (0, columns - len(norms)), value=torch.inf)
        for top in range(0, len(queries), rows):
            part, part_norms = _centred(queries, top, rows, centre, "queries")
            squared = torch.addmm(norms, part, block.T, alpha=-2, out=product[: len(part)])
            values, columns_found = _smallest(squared, min(keep, columns))
            values.add_(part_norms[:, None]).clamp_(min=0)
            found = slice(top, top + len(part))
            merged = torch.cat([best[found], values], 1)
            best[found], order = merged.topk(keep, dim=1, largest=False)
            indices[found] = torch.cat([indices[found], columns_found + start], 1).gather(1, order)
    return best, indices, largest


def centre_of(vectors: torch.Tensor, rows: int = 65536) -> torch.Tensor:
    """Return the mean vector, block by block: a memory-mapped or half-precision array stays where it is.

    Channels that broken values spoil are left at 0, so that a check of the centred vectors finds the culprit.

    Args:
        vectors: (M, C) floating point.
        rows: vectors converted at a time.

    Returns:
        (C,) float32.
    """
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), rows):
        total += vectors[start : start + rows].float().sum(0)
    mean = (total / len(vectors)).float()
    return torch.where(mean.abs() < 1e15, mean, torch.zeros_like(mean))


def row_minimum(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest value (rows,) of each row of (rows, columns) and its column, chunk by chunk.

    Raises:
        ValueError: the number of columns is not a multiple of `CHUNK`.
    """
    if matrix.shape[1] % CHUNK:
        raise ValueError(f"{matrix.shape[1]} columns: must be a multiple of {CHUNK}")
    chunks = matrix.view(len(matrix), -1, CHUNK)
    chunk = chunks.amin(2).argmin(1)  # (rows,)
    values, inside = chunks[torch.arange(len(matrix), device=matrix.device), chunk].min(1)
    return values, chunk * CHUNK + inside


def _smallest(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k smallest values of each row and their columns: all in the k chunks of least minimum."""
    rows, columns = matrix.shape
    chunks = matrix.view(rows, columns // CHUNK, CHUNK)
    chosen = chunks.amin(2).topk(min(k, columns // CHUNK), dim=1, largest=False).indices  # (rows, k)
    pool = chunks.gather(1, chosen[:, :, None].expand(-1, -1, CHUNK)).view(rows, -1)
    values, inside = pool.topk(k, dim=1, largest=False)
    return values, chosen.gather(1, inside // CHUNK) * CHUNK + inside % CHUNK


def _settle(
    queries: torch.Tensor,
    bank: torch.Tensor,
    squared: torch.Tensor,
    indices: torch.Tensor,
    scale: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate the best candidates and all rivals within rounding directly; return the k nearest."""
    rows = max(1, _block_shape(queries.device, 1)[0] // squared.shape[1])
    values = squared.new_empty((len(queries), k))
    chosen = indices.new_empty((len(queries), k))
    for top in range(0, len(queries), rows):
        part = slice(top, top + rows)
        approximate, candidate = squared[part], indices[part]
        doubt = DOUBT * (2 * approximate[:, k - 1] + 3 * scale)  # >= DOUBT * (|q|^2 + |b|^2)
        rival = approximate <= approximate[:, k - 1 : k] + doubt[:, None]
        row, column = rival.nonzero(as_tuple=True)
        exact = torch.full_like(approximate, torch.inf)
        exact[row, column] = _squared(queries[part][row], bank[candidate[row, column]])
        order = candidate.argsort(1)
        order = order.gather(1, exact.gather(1, order).argsort(dim=1, stable=True))[:, :k]
        values[part], chosen[part] = exact.gather(1, order).sqrt_(), candidate.gather(1, order)
    return values, chosen


def _squared(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.float() - right.float()).square_().sum(-1)


def _vectors(array: torch.Tensor, name: str, dims: int) -> torch.Tensor:
    tensor = torch.as_tensor(array)
    if tensor.ndim != dims or 0 in tensor.shape[-1:]:
        expected = "(rows, channels)" if dims == 2 else "(images, patches, channels)"
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; expected {expected} with at least one channel")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: dtype {tensor.dtype}; expected floating point, convert it with .float()")
    return tensor


def _comparable(queries: torch.Tensor, bank: torch.Tensor, name: str = "bank") -> None:
    if queries.shape[-1] != bank.shape[-1]:
        raise ValueError(f"queries have {queries.shape[-1]} channels, {name} has {bank.shape[-1]}: they must agree")
    if queries.device != bank.device:
        raise ValueError(f"queries are on {queries.device}, {name} is on {bank.device}: move one of them")
    if 0 in bank.shape:
        raise ValueError(f"{name}: shape {tuple(bank.shape)} holds no vectors; there is nothing to compare with")


def _block_shape(device: torch.device, bank_size: int) -> tuple[int, int]:
    """Return (query rows, bank columns) of one block; columns are a multiple of CHUNK."""
    rows, columns = (8192, 16384) if device.type == "cuda" else (1024, 8192)
    return rows, min(columns, -(-bank_size // CHUNK) * CHUNK)


def _image_block(device: torch.device) -> tuple[int, int]:
    """Return (query patches, reference patches) of one block of `patch_to_image`."""
    return (16384, 8192) if device.type == "cuda" else (4096, 2048)


def _centred(
    vectors: torch.Tensor, start: int, rows: int, centre: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows from `start` on, minus `centre`, in float32, and their squared norms; NaN is an error."""
    block = vectors[start : start + rows].float() - centre
    norms = torch.linalg.vecdot(block, block)
    if not torch.isfinite(norms).all():
        row = start + int((~torch.isfinite(norms)).nonzero()[0])
        raise ValueError(f"{name}: vector {row} holds NaN, infinity or values too large to square; remove or fix it")
    return block, norms


@contextmanager
def full_precision(device: torch.device) -> Generator[None, None, None]:
    """Keep float32 products float32: no TF32, no bfloat16, no autocast, whatever the caller switched on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
