"""The functions of ``_vocab_rows`` as Triton kernels, for logits on a GPU.

The statistics read each logit once, the gradient reads and writes it once. Top-K keeps the maxima of blocks
of columns, for some rows at a time, and reads a block again for each pick. Logits are fp32 or narrower,
everything after them is fp32. Arguments and results are those of ``_vocab_rows``; there must be a row and a
column, and the columns of a row are adjacent in memory.

Sizes are reasoned for cards like H100 and H200, not tuned: at most 64 registers a thread (what compiling for
them gives), so that four programs of 8 warps share a multiprocessor, and one loads while another reduces. To
keep the memory busy a multiprocessor needs some 25 KiB on the way (3 to 5 TB/s over 132 of them, 700 ns).
Rows are counted in thousands, so one program for a whole row is enough where sums must be collected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from apo_megatron.parallel._vocab_rows import Candidates, RowStatistics

_SCAN_TILE = 4096  # columns at a time: 8 KiB of bf16, and few enough steps that their reductions cost little
_GRADIENT_TILE = 2048  # a vector of 16 bytes of bf16 for each thread; half of what is on the way is written
_BLOCK = 128  # columns that share one maximum in the Top-K search
_NUM_WARPS = 8
_NUM_PICK_WARPS = 4  # a few thousand block maxima at most: more warps only wait for each other
_SCRATCH_BYTES = 32 << 20  # of block maxima; 7000 rows of a vocabulary of 150,000
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_NO_KEY = tl.constexpr(-(2**63))  # below every key


def row_statistics(logits: Tensor, scale: float) -> RowStatistics:
    """One pass over the logits."""
    row_max, sum_exp, sum_weighted = (_new_column(logits) for _ in range(3))
    _scan(logits, scale, row_max, sum_exp, sum_weighted, None)
    return RowStatistics(row_max, sum_exp, sum_weighted)


def best_columns(logits: Tensor, k: int, scale: float) -> Candidates:
    """The pass of ``row_statistics`` with the same sums to the bit, then k picks from the best block left."""
    num_rows, width = logits.shape
    values = logits.new_full((num_rows, k), -torch.inf, dtype=torch.float32)
    columns = logits.new_full((num_rows, k), -1, dtype=torch.int64)
    row_max, sum_exp = _new_column(logits), _new_column(logits)
    num_blocks = triton.cdiv(width, _BLOCK)
    rows_at_a_time = min(num_rows, max(1, _SCRATCH_BYTES // (4 * num_blocks)))
    block_max = logits.new_empty((rows_at_a_time, num_blocks), dtype=torch.float32)
    for start in range(0, num_rows, rows_at_a_time):
        rows = slice(start, min(start + rows_at_a_time, num_rows))
        part = logits[rows]
        _scan(part, scale, row_max[rows], sum_exp[rows], None, block_max)
        with torch.cuda.device_of(logits):
            _pick_best[(len(part),)](
                part,
                part.stride(0),
                width,
                block_max,
                num_blocks,
                min(k, width),
                k,
                values[rows],
                columns[rows],
                MAXIMA=triton.next_power_of_2(num_blocks),
                BLOCK=_BLOCK,
                num_warps=_NUM_PICK_WARPS,
            )
    return Candidates(values, columns, row_max, sum_exp)


def overwrite_with_gradient(
    logits: Tensor,
    scale: float,
    row_max: Tensor,
    exp_coeff: Tensor,
    weighted_coeff: Tensor | None,
    columns: Tensor,
    column_grads: Tensor,
) -> None:
    """A program for each tile of each row. Gradients of one column add up in the order of its slots."""
    _check(logits)
    num_rows, width = logits.shape
    num_slots = columns.shape[1]
    num_tiles = triton.cdiv(width, _GRADIENT_TILE)
    with torch.cuda.device_of(logits):
        _write_gradient[(num_rows * num_tiles,)](
            logits,
            logits.stride(0),
            width,
            _num_readable(logits),
            num_tiles,
            scale,
            row_max.contiguous(),
            exp_coeff.contiguous(),
            None if weighted_coeff is None else weighted_coeff.contiguous(),
            columns.contiguous(),
            column_grads.contiguous(),
            num_slots,
            TILE=_GRADIENT_TILE,
            SLOTS=triton.next_power_of_2(num_slots),
            WITH_WEIGHTED=weighted_coeff is not None,
            num_warps=_NUM_WARPS,
        )


def _scan(
    logits: Tensor,
    scale: float,
    row_max: Tensor,
    sum_exp: Tensor,
    sum_weighted: Tensor | None,
    block_max: Tensor | None,
) -> None:
    """Fill what is given. One kernel and one tile for all, so that the sums agree to the bit."""
    _check(logits)
    num_rows, width = logits.shape
    num_blocks = triton.cdiv(width, _BLOCK)
    with torch.cuda.device_of(logits):
        _scan_row[(num_rows,)](
            logits,
            logits.stride(0),
            width,
            _num_readable(logits),
            num_blocks,
            scale,
            row_max,
            sum_exp,
            sum_weighted,
            block_max,
            TILE_BLOCKS=min(_SCAN_TILE // _BLOCK, triton.next_power_of_2(num_blocks)),
            BLOCK=_BLOCK,
            WITH_WEIGHTED=sum_weighted is not None,
            WITH_MAXIMA=block_max is not None,
            num_warps=_NUM_WARPS,
        )


def _check(logits: Tensor) -> None:
    assert logits.numel() > 0 and logits.stride(1) == 1, (
        f"logits {tuple(logits.shape)} with strides {logits.stride()}: the columns of a row must be adjacent"
    )
    assert logits.dtype.itemsize <= 4, f"the kernels compute in fp32, not in {logits.dtype}"
    assert logits.shape[1] < 2**31 - _SCAN_TILE, (
        f"{logits.shape[1]} columns: offsets within a row are 32 bits"
    )


def _num_readable(logits: Tensor) -> int:
    """Columns of a row that may be touched: the width, rounded up to whole vectors where padding follows.

    A load or store under ``column < width`` goes column by column unless 16 divides the width.
    """
    num_rows, width = logits.shape
    rounded = triton.cdiv(width, 16) * 16
    end = logits.storage_offset() + (num_rows - 1) * logits.stride(0) + rounded
    is_inside = rounded <= logits.stride(0) and end * logits.itemsize <= logits.untyped_storage().nbytes()
    return rounded if is_inside else width


def _new_column(logits: Tensor) -> Tensor:
    return logits.new_empty((len(logits),), dtype=torch.float32)


# Offsets of rows are 64 bits: rows times columns exceed 2^31.


@triton.jit
def _scan_row(
    logits: tl.tensor,
    row_stride: tl.tensor,
    width: tl.tensor,
    num_readable: tl.tensor,
    num_blocks: tl.tensor,
    scale: tl.tensor,
    row_max: tl.tensor,
    sum_exp: tl.tensor,
    sum_weighted: tl.tensor,
    block_max: tl.tensor,
    TILE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_WEIGHTED: tl.constexpr,
    WITH_MAXIMA: tl.constexpr,
) -> None:
    """A row, tile by tile: the sums of 2^s and of 2^s * s, s = logits * scale - highest, and block maxima.

    Tiles are [TILE_BLOCKS, BLOCK]. One maximum for all columns so far: a logit costs a single exp2, and sums
    shrink when a tile raises it.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    block_numbers = tl.arange(0, TILE_BLOCKS)
    offsets = block_numbers[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    highest = _LOWEST
    total = 0.0
    weighted = 0.0
    for start in range(0, width, TILE_BLOCKS * BLOCK):
        columns = start + offsets
        is_column = columns < width
        tile = tl.load(logits + columns, mask=columns < num_readable, other=0.0).to(tl.float32)
        tile = tl.where(is_column, tile, float("-inf"))
        maxima = tl.max(tile, 1)
        if WITH_MAXIMA:
            blocks = start // BLOCK + block_numbers
            tl.store(block_max + row * num_blocks + blocks, maxima, mask=blocks < num_blocks)
        before = highest
        highest = tl.maximum(before, tl.max(maxima, 0) * scale)
        shift = before - highest
        shrink = tl.exp2(shift)
        shifted = tl.fma(tile, scale, -highest)
        exp = tl.exp2(shifted)
        if WITH_WEIGHTED:
            tile_weighted = tl.sum(tl.sum(tl.where(is_column, shifted, 0.0) * exp, 1), 0)
            weighted = shrink * (weighted + shift * total) + tile_weighted
        total = shrink * total + tl.sum(tl.sum(exp, 1), 0)
    tl.store(row_max + row, highest)
    tl.store(sum_exp + row, total)
    if WITH_WEIGHTED:
        tl.store(sum_weighted + row, weighted)


@triton.jit
def _write_gradient(
    logits: tl.tensor,
    row_stride: tl.tensor,
    width: tl.tensor,
    num_readable: tl.tensor,
    num_tiles: tl.tensor,
    scale: tl.tensor,
    row_max: tl.tensor,
    exp_coeff: tl.tensor,
    weighted_coeff: tl.tensor,
    columns: tl.tensor,
    column_grads: tl.tensor,
    num_slots: tl.tensor,
    TILE: tl.constexpr,
    SLOTS: tl.constexpr,
    WITH_WEIGHTED: tl.constexpr,
) -> None:
    """One tile of one row; neighbouring programs write neighbouring tiles."""
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    start = program % num_tiles * TILE
    offsets = start + tl.arange(0, TILE)
    is_readable = offsets < num_readable
    places = logits + row * row_stride + offsets
    tile = tl.load(places, mask=is_readable, other=0.0)
    columns += row * num_slots
    column_grads += row * num_slots
    slots = tl.arange(0, SLOTS)
    chosen = tl.load(columns + slots, mask=slots < num_slots, other=-1)
    grads = tl.load(column_grads + slots, mask=slots < num_slots, other=0.0)

    shifted = tl.fma(tile.to(tl.float32), scale, -tl.load(row_max + row))
    coeff = tl.load(exp_coeff + row)
    if WITH_WEIGHTED:
        coeff = tl.fma(shifted, tl.load(weighted_coeff + row), coeff)
    gradient = tl.exp2(shifted) * coeff
    # Few tiles hold a chosen column; columns of other ranks have gradient 0.
    is_here = (chosen >= start) & (chosen < start + TILE) & (grads != 0.0)
    if tl.sum(is_here.to(tl.int32), 0) > 0:
        for slot in range(num_slots):
            gradient += tl.where(offsets == tl.load(columns + slot), tl.load(column_grads + slot), 0.0)
    result = tl.where(offsets < width, gradient.to(tile.dtype), tile)
    tl.store(places, result, mask=is_readable)


@triton.jit
def _pick_best(
    logits: tl.tensor,
    row_stride: tl.tensor,
    width: tl.tensor,
    block_max: tl.tensor,
    num_blocks: tl.tensor,
    num_picks: tl.tensor,
    k: tl.tensor,
    values: tl.tensor,
    columns: tl.tensor,
    MAXIMA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The best columns of a row, one after the other.

    Each is in the block with the highest maximum of what is left (the lowest of equals). Everything better
    has been taken, so what is left of that block are its keys below the last pick.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    blocks = tl.arange(0, MAXIMA)
    is_block = blocks < num_blocks
    maxima = tl.load(block_max + row * num_blocks + blocks, mask=is_block, other=0.0)
    keys = tl.where(is_block, _keys(maxima, blocks), _NO_KEY)
    last = tl.full((), 2**63 - 1, tl.int64)
    for pick in range(num_picks):
        best = tl.max(keys, 0)
        block = (_ordered(best) << 32) - best
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        tile = tl.load(logits + offsets, mask=offsets < width, other=0.0).to(tl.float32)
        candidates = _keys(tile, offsets)
        candidates = tl.where((offsets < width) & (candidates < last), candidates, _NO_KEY)
        last = tl.max(candidates, 0)
        ordered = _ordered(last)
        tl.store(columns + row * k + pick, (ordered << 32) - last)
        tl.store(values + row * k + pick, _in_order(ordered.to(tl.int32)).to(tl.float32, bitcast=True))
        left = tl.max(tl.where(candidates < last, candidates, _NO_KEY), 0)
        left = tl.where(left == _NO_KEY, left, (_ordered(left) << 32) - block)
        keys = tl.where(blocks == block, left, keys)


@triton.jit
def _keys(values: tl.tensor, positions: tl.tensor) -> tl.tensor:
    """64-bit integers in the order of the search: value ascending, then position descending."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are one value
    return (_in_order(bits).to(tl.int64) << 32) - positions


@triton.jit
def _in_order(bits: tl.tensor) -> tl.tensor:
    """From the bits of floats to integers in the order of the floats, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _ordered(key: tl.tensor) -> tl.tensor:
    """The value's part of a key; positions are below 2^31."""
    return (key + 0x7FFFFFFF) >> 32
