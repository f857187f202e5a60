"""The LM head and the vocabulary ops in one: logits of more than one tile never exist.

The logits ``hidden @ weight.T`` are made tile by tile, some rows by some columns of this rank, and each tile
becomes a few numbers a row before the next takes its place; backward makes every tile again. Same
definitions as in ``vocab``, same results as its ops on the whole logits, up to the order in which a matrix
product sums. It costs one matrix product more than they do and is for logits that do not fit.

Tiles run over the rows within a block of columns, so the gradient of a block of the weight is complete
before the next begins and needs an fp32 accumulator of the size of the block only.

Shapes: T token rows, H hidden size, V padded vocabulary columns, p ranks, K support tokens, E extra tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.parallel._vocab_rows import Candidates, RowStatistics, compute_dtype
from apo_megatron.parallel._vocab_rows_by_device import row_functions
from apo_megatron.parallel._vocab_terms import (
    ChosenColumns,
    PolicyTerms,
    ReferenceTerms,
    SoftmaxRows,
    base_2_scale,
    first_best,
    gradient_rows,
    locate,
    policy_terms,
    rescaled_sums,
    support_and_extra,
    topk_log_probs,
)
from apo_megatron.parallel.vocab_shard import VocabShard


class TileSize(NamedTuple):
    """The most rows and columns of logits that exist at a time."""

    rows: int
    columns: int


# 16 MiB in fp32. Products want many rows (and so do the sums of products, which each tile reads and writes),
# the Top-K search wants many columns.
CPU_TILE = TileSize(1024, 4096)
GPU_TILE = TileSize(4096, 8192)  # 64 MiB in bf16


def lm_head_policy_terms(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    support_ids: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    extra_ids: Tensor | None = None,
    *,
    main_grad: Tensor | None = None,
    tile: TileSize | None = None,
) -> PolicyTerms:
    """``vocab_parallel_policy_terms`` of ``hidden @ weight.T``, which never exists as a whole.

    hidden [T, H], the same on every rank of the group; weight [V/p, H], this rank's rows of the output layer
    (or of the embedding where they are tied); both in one dtype, fp32, bf16 or float64. Logits are rounded to
    that dtype, everything after them is fp32 (float64 for float64). targets [T], support_ids [T, K],
    temperature, extra_ids [T, E] and errors as in ``vocab_parallel_policy_terms``; T may be 0 on every rank
    of the group. ``tile``: default by device.

    Collectives over the group: two all-reduces of a few numbers a row in the forward; in the backward one of
    the gradient of hidden [T, H], in fp32 (float64 for float64). That gradient is then **complete on every
    rank**: the caller reduces nothing, and with sequence parallelism only takes its own slice of it
    (``gather_from_sequence_parallel_region`` with ``tensor_parallel_output_grad=False``).

    Gradients are summed over tiles and ranks in fp32 and then rounded to the dtype of their tensor; in bf16
    the gradient of the logits and each tile's product with a factor are bf16. With ``main_grad`` [V/p, H]
    fp32 (Megatron's ``weight.main_grad``) the gradient of weight is summed in that buffer, without the last
    rounding, and autograd gets none for it. Megatron's DDP then adds what else autograd finds for the
    weight (a tied embedding), as long as ``weight.grad_added_to_main_grad`` is False; with
    ``overlap_grad_reduce`` it wants a gradient from autograd for every parameter, so there leave main_grad
    out. Megatron's ``gradient_accumulation_fusion`` has no influence here.

    A second backward of a kept graph is possible; a double backward raises RuntimeError.
    """
    _check(hidden, weight, shard, temperature)
    if main_grad is not None:
        assert main_grad.shape == weight.shape and main_grad.dtype == compute_dtype(weight), (
            f"main_grad {tuple(main_grad.shape)} {main_grad.dtype} does not suit weight {tuple(weight.shape)}"
        )
    ids, num_support = support_and_extra(support_ids, extra_ids), support_ids.shape[1]
    return PolicyTerms(
        *_LMHeadTerms.apply(hidden, weight, targets, ids, num_support, shard, temperature, main_grad, tile)
    )


@torch.no_grad()
def lm_head_topk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    k: int,
    shard: VocabShard,
    temperature: float = 1.0,
    *,
    tile: TileSize | None = None,
) -> ReferenceTerms:
    """``vocab_parallel_topk`` of ``hidden @ weight.T`` and the log-probs of the targets; no gradients.

    One projection and one all-gather for both. Arguments as in ``lm_head_policy_terms``, k >= 1. Top-K in the
    order of ``vocab_parallel_topk``: logit descending, then id ascending. On one rank the log-probs equal
    those of ``lm_head_policy_terms`` to the bit where hidden, weight and tile are the same.

    Raises RuntimeError where a target is outside the vocabulary (on a GPU: asynchronously).
    """
    _check(hidden, weight, shard, temperature)
    assert k >= 1, f"k must be positive, not {k}"
    chosen_columns = locate(targets, targets.new_empty(len(targets), 0), shard)
    scale = base_2_scale(temperature)
    nothing = hidden[:, :0]
    best = row_functions(nothing).best_columns(nothing, k, scale)  # of no column yet
    chosen = best.row_max.new_zeros((len(hidden), 1))
    tiles = _Tiles(hidden, weight, shard, tile)
    for columns in tiles.blocks():
        for rows, logits in tiles.of_block(columns):
            _keep_chosen(chosen, logits, chosen_columns, rows, columns)
            found = row_functions(logits).best_columns(logits, k, scale)
            _merge_candidates(best, found, rows, columns)
    log_probs, ids, target_log_probs = topk_log_probs(best, chosen, shard, temperature)
    return ReferenceTerms(log_probs, ids, target_log_probs.squeeze(1))


class _LMHeadTerms(torch.autograd.Function):
    """Saves hidden, weight and a few numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ids: Tensor,
        num_support: int,
        shard: VocabShard,
        temperature: float,
        main_grad: Tensor | None,
        tile: TileSize | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen_columns = locate(targets, ids, shard)
        scale = base_2_scale(temperature)
        nothing = hidden[:, :0]
        statistics = row_functions(nothing).row_statistics(nothing, scale)  # of no column yet
        chosen = statistics.row_max.new_zeros(chosen_columns.columns.shape)
        tiles = _Tiles(hidden, weight, shard, tile)
        for columns in tiles.blocks():
            for rows, logits in tiles.of_block(columns):
                _keep_chosen(chosen, logits, chosen_columns, rows, columns)
                found = row_functions(logits).row_statistics(logits, scale)
                _merge_statistics(statistics, found, rows)
        terms, softmax_rows = policy_terms(
            statistics, chosen, chosen_columns.is_absent, num_support, shard, temperature
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, *chosen_columns, *softmax_rows)
        ctx.shard, ctx.temperature, ctx.main_grad, ctx.tile = shard, temperature, main_grad, tile
        return terms

    @staticmethod
    def backward(
        ctx: Any,
        grad_log_probs: Tensor | None,
        grad_anchor: Tensor | None,
        grad_entropy: Tensor | None,
        grad_extra: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Makes each tile again, turns it into its gradient and multiplies that with both factors."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lm_head_policy_terms has no double backward: call backward without create_graph=True"
            )
        hidden, weight, *saved = ctx.saved_tensors
        chosen_columns, softmax_rows = ChosenColumns(*saved[:3]), SoftmaxRows(*saved[3:])
        exp_coeff, weighted_coeff, column_grads = gradient_rows(
            softmax_rows,
            chosen_columns.is_local,
            grad_log_probs,
            grad_anchor,
            grad_entropy,
            grad_extra,
            ctx.temperature,
        )
        dtype, scale = compute_dtype(hidden), base_2_scale(ctx.temperature)
        tiles = _Tiles(hidden, weight, ctx.shard, ctx.tile)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype)
        grad_weight = torch.zeros_like(weight) if ctx.main_grad is None else ctx.main_grad
        scratch = None if grad_weight.dtype == dtype else tiles.new_weight_block(dtype)
        for columns in tiles.blocks():
            target = grad_weight[columns]
            total = target if scratch is None else scratch[: len(target)].zero_()
            for rows, logits in tiles.of_block(columns):
                positions, is_inside = _in_block(chosen_columns, rows, columns)
                row_functions(logits).overwrite_with_gradient(
                    logits,
                    scale,
                    softmax_rows.row_max[rows],
                    exp_coeff[rows],
                    None if weighted_coeff is None else weighted_coeff[rows],
                    positions,
                    column_grads[rows].masked_fill(~is_inside, 0.0),
                )
                _add_product(grad_hidden[rows], logits, weight[columns])
                _add_product(total, logits.t(), hidden[rows])
            if scratch is not None:
                target.copy_(total)
        if ctx.shard.world > 1:
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        returned = grad_weight if ctx.main_grad is None else None
        return grad_hidden.to(hidden.dtype), returned, *[None] * 7


class _Tiles:
    """The logits of this rank's real columns, one tile at a time in a buffer that is reused."""

    def __init__(self, hidden: Tensor, weight: Tensor, shard: VocabShard, size: TileSize | None) -> None:
        self._hidden, self._weight, self._num_columns = hidden, weight, shard.num_real_columns
        largest = size or (CPU_TILE if hidden.device.type == "cpu" else GPU_TILE)
        self._size = TileSize(min(largest.rows, len(hidden)), min(largest.columns, self._num_columns))
        self._buffer = hidden.new_empty(self._size.rows * self._size.columns)

    def blocks(self) -> Iterator[slice]:
        """Columns of one tile after the other."""
        return _pieces(self._num_columns, self._size.columns)

    def of_block(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Rows and logits of each tile of these columns; the next takes the place of the one before."""
        block = self._weight[columns].t()
        for rows in _pieces(len(self._hidden), self._size.rows):
            part = self._hidden[rows]
            shape = (len(part), block.shape[1])
            yield rows, torch.mm(part, block, out=self._buffer[: shape[0] * shape[1]].view(shape))

    def new_weight_block(self, dtype: torch.dtype) -> Tensor:
        """Uninitialised rows of the weight, as many as a tile has columns."""
        return self._weight.new_empty((self._size.columns, self._weight.shape[1]), dtype=dtype)


def _check(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> None:
    assert weight.dim() == 2 and len(weight) == shard.width, (
        f"weight {tuple(weight.shape)} is not [{shard.width}, H] of {shard}"
    )
    assert hidden.dim() == 2 and hidden.shape[1] == weight.shape[1] and hidden.dtype == weight.dtype, (
        f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype}"
    )
    assert temperature > 0, f"temperature must be positive, not {temperature}"


def _pieces(num: int, size: int) -> Iterator[slice]:
    for start in range(0, num, max(size, 1)):
        yield slice(start, min(start + size, num))


def _in_block(chosen: ChosenColumns, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Positions [rows, 1 + C] of the chosen columns in a block, 0 where outside, and whether inside."""
    positions = chosen.columns[rows] - columns.start
    is_inside = chosen.is_local[rows] & (positions >= 0) & (positions < columns.stop - columns.start)
    return positions.masked_fill_(~is_inside, 0), is_inside


def _keep_chosen(kept: Tensor, logits: Tensor, chosen: ChosenColumns, rows: slice, columns: slice) -> None:
    """Copy the chosen logits of a tile to ``kept`` [T, 1 + C]."""
    positions, is_inside = _in_block(chosen, rows, columns)
    kept[rows] = torch.where(is_inside, logits.gather(1, positions).to(kept.dtype), kept[rows])


def _merge_statistics(total: RowStatistics, part: RowStatistics, rows: slice) -> None:
    """Add the statistics of other columns to some rows of ``total``."""
    of_rows = RowStatistics(*(values[rows] for values in total))
    row_max = torch.maximum(of_rows.row_max, part.row_max)
    sums = zip(rescaled_sums(of_rows, row_max), rescaled_sums(part, row_max), strict=True)
    for target, value in zip(of_rows, (row_max, *(a + b for a, b in sums)), strict=True):
        target.copy_(value)


def _merge_candidates(best: Candidates, found: Candidates, rows: slice, columns: slice) -> None:
    """Add the candidates of a block of higher columns to some rows of ``best``."""
    of_rows = Candidates(*(values[rows] for values in best))
    row_max = torch.maximum(of_rows.row_max, found.row_max)
    sum_exp = torch.exp2(of_rows.row_max - row_max) * of_rows.sum_exp
    sum_exp += torch.exp2(found.row_max - row_max) * found.sum_exp
    local = torch.where(found.columns < 0, found.columns, found.columns + columns.start)
    values, ids = first_best(
        torch.cat([of_rows.values, found.values], 1), torch.cat([of_rows.columns, local], 1), local.shape[1]
    )
    for target, value in zip(of_rows, (values, ids, row_max, sum_exp), strict=True):
        target.copy_(value)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
