"""Cuts sequences into micro-batches, equally many on every rank, and finds the way back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.actor.model_inputs import (
    Layout,
    ModelInput,
    make_model_input,
    packed_layout,
    padded_layout,
    round_up,
)
from apo_megatron.data.packing import pack, pack_into
from apo_megatron.parallel.collectives import all_reduce_max
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import MicroBatch


@dataclass(frozen=True)
class MicroBatchSize:
    """``max_tokens``: sequences are packed one after the other, up to so many tokens on all context-parallel
    ranks together. None: ``num_sequences`` rows, padded to one length."""

    num_sequences: int = 1
    max_tokens: int | None = None


@dataclass(frozen=True)
class MicroBatches:
    """The model inputs of one pass over some sequences; their tokens may come in another order."""

    inputs: list[ModelInput]
    length: int  # the longest S of all, to which all are padded where stages exchange hidden states
    token_order: Tensor  # of each trained token this rank sees, its place among those of the sequences
    num_tokens: int  # of the sequences
    parallel: ParallelContext

    def in_order(self, values: Tensor) -> Tensor:
        """[T of this rank, ...] in the order of the inputs -> [T, ...] of the sequences, row-major.

        Collective over the context-parallel ranks, which have a part of the tokens each.
        """
        result = values.new_zeros((self.num_tokens, *values.shape[1:]))
        result[self.token_order.to(values.device)] = values
        if self.parallel.dims.context > 1:
            summed = result.int() if result.dtype == torch.bool else result
            dist.all_reduce(summed, group=self.parallel.context_group)
            result = summed.to(result.dtype)
        return result


def split_into_micro_batches(
    sequences: MicroBatch, size: MicroBatchSize, parallel: ParallelContext
) -> MicroBatches:
    """Micro-batches of all ``sequences``. Collective over all ranks.

    Every rank gets the same number (unequal counts hang pipelines), at least one; what is missing is
    padding without trained tokens. No sequence is cut; what follows its last trained token is left out.
    """
    is_trained = sequences.loss_mask
    positions = torch.arange(1, is_trained.shape[1] + 1)
    lengths: list[int] = (is_trained * positions).amax(dim=1).tolist() if len(is_trained) else []
    layouts = (
        _padded_layouts(lengths, size.num_sequences, is_trained.shape[1], parallel)
        if size.max_tokens is None
        else _packed_layouts(lengths, size.max_tokens, is_trained.shape[1], parallel)
    )
    inputs, found = zip(*(make_model_input(sequences, layout, parallel) for layout in layouts), strict=True)
    place = is_trained.flatten().cumsum(0) - 1
    return MicroBatches(
        inputs=list(inputs),
        length=max(layout.length for layout in layouts),
        token_order=place[torch.cat(found)],
        num_tokens=int(is_trained.sum()),
        parallel=parallel,
    )


def _padded_layouts(
    lengths: Sequence[int], num_rows: int, width: int, parallel: ParallelContext
) -> list[Layout]:
    """In order, all of one length."""
    count = _equal_count(-(-len(lengths) // num_rows), parallel)
    length = max([1, *lengths])
    if _exchanges_tokens(parallel.dims):
        length = all_reduce_max(length, parallel)
    length = round_up(length, _multiple_of_micro_batch(parallel.dims))
    rows = range(len(lengths))
    return [
        padded_layout(rows[i * num_rows : (i + 1) * num_rows], lengths, num_rows, length, width)
        for i in range(count)
    ]


def _packed_layouts(
    lengths: Sequence[int], max_tokens: int, width: int, parallel: ParallelContext
) -> list[Layout]:
    dims = parallel.dims
    multiple, whole = _multiple_of_sequence(dims), _multiple_of_micro_batch(dims)
    capacity = max(max_tokens // whole, 1) * whole
    padded = [round_up(length, multiple) for length in lengths]
    speaks = parallel.tensor_rank == parallel.context_rank == parallel.pipeline_rank == 0
    if speaks and max(padded, default=0) > capacity:
        warnings.warn(
            f"a sequence of {max(lengths)} tokens is longer than train.max_tokens_per_micro_batch="
            f"{max_tokens}: such sequences run alone and need more memory",
            stacklevel=2,
        )
    count = _equal_count(len(pack(padded, capacity)), parallel)
    bins = pack_into(padded, capacity, count)
    sizes = [round_up(max(1, sum(padded[row] for row in part)), whole) for part in bins]
    if dims.pipeline > 1 or _exchanges_tokens(dims):  # one shape for all
        longest = max(sizes)
        sizes = [all_reduce_max(longest, parallel) if _exchanges_tokens(dims) else longest] * count
    return [
        packed_layout(part, lengths, multiple, length, width)
        for part, length in zip(bins, sizes, strict=True)
    ]


def _equal_count(needed: int, parallel: ParallelContext) -> int:
    count = max(1, all_reduce_max(needed, parallel))
    if parallel.dims.virtual_pipeline is not None:  # the interleaved schedule wants whole rounds
        count = round_up(count, parallel.dims.pipeline)
    return count


def _exchanges_tokens(dims: ParallelDims) -> bool:
    """Whether ranks gather the tokens of others for their experts, and so need equally many."""
    return dims.expert * dims.expert_tensor > 1


def _multiple_of_sequence(dims: ParallelDims) -> int:
    return 2 * dims.context if dims.context > 1 else 1


def _multiple_of_micro_batch(dims: ParallelDims) -> int:
    return _multiple_of_sequence(dims) * (dims.tensor if dims.sequence_parallel else 1)
