"""What one rank computes on its own columns of the logits: row statistics, gradients, Top-K candidates.

No collectives here. Everything of size [rows, V] happens in a scratch of a few rows that is reused: on a CPU
those rows stay in the cache and no fresh page is touched, on a GPU they bound the extra memory.

Exponents are kept in base 2: with ``scale = log2(e) / temperature`` one fused multiply-add gives
``logits * scale - max``, and exp2 is several times cheaper than exp on a CPU. The rounding of ``max`` is the
same for every column of a row, so it cancels wherever the exponents and their sum are used together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CPU_SCRATCH_BYTES = 2 << 20  # stays in a core's cache
_GPU_SCRATCH_BYTES = 32 << 20  # enough columns to hide the launch of a kernel
_BLOCK = 128  # columns that share one maximum in the Top-K search


class RowStatistics(NamedTuple):
    """Sums over one rank's columns, in base 2: s = logits * scale - row_max. Each [T], compute dtype."""

    row_max: Tensor  # max of logits * scale; the lowest finite number where there are no columns
    sum_exp: Tensor  # sum of 2^s
    sum_weighted: Tensor  # sum of 2^s * s


class Candidates(NamedTuple):
    """The best columns of one rank, value descending, then column ascending."""

    values: Tensor  # [T, k] compute dtype; -inf where there is no such column
    columns: Tensor  # [T, k] int64, local; -1 where there is no such column
    row_max: Tensor  # [T], as in RowStatistics
    sum_exp: Tensor  # [T]


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 stays float64 (for checks); everything else is computed in fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def exponents(logits: Tensor, row_max: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """s = logits * scale - row_max with a single rounding; logits [rows, n], row_max [rows]."""
    return torch.add(row_max.neg().unsqueeze(1), logits, alpha=scale, out=out)


def row_statistics(logits: Tensor, scale: float) -> RowStatistics:
    """Statistics of logits [T, n] (no padding columns), n may be 0."""
    num_rows, width = logits.shape
    dtype = compute_dtype(logits)
    row_max = logits.new_full((num_rows,), torch.finfo(dtype).min, dtype=dtype)
    sum_exp, sum_weighted = torch.zeros_like(row_max), torch.zeros_like(row_max)
    if width == 0:
        return RowStatistics(row_max, sum_exp, sum_weighted)
    exponent_scratch, exp_scratch = _scratch(logits), _scratch(logits)
    for rows in _chunks(logits):
        chunk = _in_compute_dtype(logits[rows], exp_scratch)
        shifted, exp = exponent_scratch[: len(chunk)], exp_scratch[: len(chunk)]
        torch.amax(chunk, 1, out=row_max[rows]).mul_(scale)
        exponents(chunk, row_max[rows], scale, out=shifted)
        torch.exp2(shifted, out=exp)
        torch.sum(exp, 1, out=sum_exp[rows])
        torch.sum(shifted.mul_(exp), 1, out=sum_weighted[rows])
    return RowStatistics(row_max, sum_exp, sum_weighted)


def overwrite_with_gradient(
    logits: Tensor,
    scale: float,
    row_max: Tensor,
    exp_coeff: Tensor,
    weighted_coeff: Tensor | None,
    columns: Tensor,
    column_grads: Tensor,
) -> None:
    """Replace logits [T, n] by 2^s * (exp_coeff + weighted_coeff * s), plus column_grads at columns.

    row_max and both coefficients are [T]; columns [T, C] int64 and column_grads [T, C] may repeat a column.
    weighted_coeff is None where no gradient of the entropy is wanted.
    """
    in_place = logits.dtype == compute_dtype(logits)
    chunk_scratch = logits if in_place else _scratch(logits)
    exp_scratch = None if weighted_coeff is None else _scratch(logits)
    for rows in _chunks(logits):
        target = logits[rows]
        chunk = target if in_place else _in_compute_dtype(target, chunk_scratch)
        exponents(chunk, row_max[rows], scale, out=chunk)
        if weighted_coeff is None or exp_scratch is None:
            chunk.exp2_().mul_(exp_coeff[rows].unsqueeze(1))
        else:
            exp = torch.exp2(chunk, out=exp_scratch[: len(chunk)])
            chunk.mul_(weighted_coeff[rows].unsqueeze(1)).add_(exp_coeff[rows].unsqueeze(1)).mul_(exp)
        chunk.scatter_add_(1, columns[rows], column_grads[rows])
        if not in_place:
            target.copy_(chunk)


def best_columns(logits: Tensor, k: int, scale: float) -> Candidates:
    """The k best columns of logits [T, n] (no padding columns, n may be 0 or below k), and sums as above.

    Exact: a column among the k best lies in one of the k blocks whose maxima are best (equal maxima: the
    lower block first), because each of those blocks holds a column that beats every column of any other.
    """
    num_rows, width = logits.shape
    dtype = compute_dtype(logits)
    values = logits.new_full((num_rows, k), -torch.inf, dtype=dtype)
    columns = logits.new_full((num_rows, k), -1, dtype=torch.int64)
    row_max = logits.new_full((num_rows,), torch.finfo(dtype).min, dtype=dtype)
    sum_exp = torch.zeros_like(row_max)
    num_found = min(k, width)
    if num_found == 0:
        return Candidates(values, columns, row_max, sum_exp)
    num_blocks = width // _BLOCK
    if num_blocks <= k:
        num_blocks = 0  # every column is a candidate
    scratch = _scratch(logits)
    # The 64-bit keys of the search and their temporaries take several times the room of the maxima.
    search_width = 8 * (num_blocks + 1 + min(width, k * _BLOCK))
    block_max = logits.new_empty((_rows_per_chunk(logits, search_width), num_blocks + 1), dtype=dtype)
    for rows in _chunks(logits, search_width):
        part, maxima = logits[rows], block_max[: len(logits[rows])]
        _scan_blocks(part, scale, maxima, row_max[rows], sum_exp[rows], scratch)
        candidates = _candidate_columns(maxima[:, :-1], k, width)
        candidate_values = part.gather(1, candidates).to(dtype).add_(0.0)  # not every sort holds -0.0 == 0.0
        best = _first_largest(candidate_values, num_found)
        values[rows, :num_found] = candidate_values.gather(1, best)
        columns[rows, :num_found] = candidates.gather(1, best)
    return Candidates(values, columns, row_max, sum_exp)


def _scan_blocks(
    logits: Tensor, scale: float, block_max: Tensor, row_max: Tensor, sum_exp: Tensor, scratch: Tensor
) -> None:
    """One pass over logits [rows, n] that fills block_max [rows, B + 1], row_max [rows] and sum_exp [rows].

    The last column of block_max is the maximum of the columns after the B whole blocks.
    """
    num_blocks = block_max.shape[1] - 1
    in_blocks = num_blocks * _BLOCK
    for rows in _chunks(logits):
        chunk = _in_compute_dtype(logits[rows], scratch)
        maxima = block_max[rows].fill_(-torch.inf)
        if num_blocks > 0:
            maxima[:, :-1] = chunk[:, :in_blocks].unflatten(1, (num_blocks, _BLOCK)).amax(2)
        if in_blocks < logits.shape[1]:
            maxima[:, -1] = chunk[:, in_blocks:].amax(1)
        torch.amax(maxima, 1, out=row_max[rows]).mul_(scale)
        shifted = exponents(chunk, row_max[rows], scale, out=scratch[: len(chunk)])
        torch.sum(shifted.exp2_(), 1, out=sum_exp[rows])


def _candidate_columns(block_max: Tensor, k: int, width: int) -> Tensor:
    """The columns [rows, C] int64 of the k best blocks and those after the last block, ascending."""
    num_rows, num_blocks = block_max.shape
    rest = torch.arange(num_blocks * _BLOCK, width, device=block_max.device).expand(num_rows, -1)
    if num_blocks == 0:
        return rest
    blocks = _first_largest(block_max, k).sort(1).values
    offsets = torch.arange(_BLOCK, device=block_max.device)
    return torch.cat([(blocks.unsqueeze(2) * _BLOCK + offsets).flatten(1), rest], 1)


def _first_largest(values: Tensor, k: int) -> Tensor:
    """Positions [rows, k] of the k largest of values [rows, n]: value descending, then position ascending.

    torch.topk leaves the order of equal values open, so the position is made part of a 64-bit key.
    """
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (values + 0.0).view(torch.int32)  # -0.0 and 0.0 are one value
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    positions = torch.arange(values.shape[1], device=values.device)
    return ((ordered.to(torch.int64) << 32) - positions).topk(k, 1).indices


def _chunks(logits: Tensor, width: int | None = None) -> Iterator[slice]:
    step = _rows_per_chunk(logits, width)
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _rows_per_chunk(logits: Tensor, width: int | None = None) -> int:
    """Rows that fit the scratch, in compute dtype, at ``width`` columns (default: those of the logits)."""
    num_bytes = _CPU_SCRATCH_BYTES if logits.device.type == "cpu" else _GPU_SCRATCH_BYTES
    row_bytes = max(1, logits.shape[1] if width is None else width) * compute_dtype(logits).itemsize
    return max(1, min(len(logits), num_bytes // row_bytes))


def _scratch(logits: Tensor) -> Tensor:
    return logits.new_empty((_rows_per_chunk(logits), logits.shape[1]), dtype=compute_dtype(logits))


def _in_compute_dtype(chunk: Tensor, scratch: Tensor) -> Tensor:
    """chunk itself, or its copy in the scratch where its dtype is narrower."""
    return chunk if chunk.dtype == scratch.dtype else scratch[: len(chunk)].copy_(chunk)
