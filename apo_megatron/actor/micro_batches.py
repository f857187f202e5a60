"""Cuts sequences into micro-batches, equally many on every rank, and finds the way back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

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
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import PaddedSequences


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
    sequences: PaddedSequences, size: MicroBatchSize, parallel: ParallelContext
) -> MicroBatches:
    """Micro-batches of all ``sequences``. Collective over all ranks.

    Every rank gets the same number (unequal counts hang pipelines), at least one; what is missing is
    padding without trained tokens. No sequence is cut; what follows its last trained token is left out.
    """
    if not sequences.num_sequences:  # a rank without any: it takes part with padding
        sequences = _one_untrained_row(sequences)
    is_trained = sequences.loss_mask
    positions = torch.arange(1, is_trained.shape[1] + 1)
    lengths: list[int] = (is_trained * positions).amax(dim=1).tolist()
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
    """In order, all of one shape."""
    count = _equal_count(-(-len(lengths) // num_rows), parallel)
    num_rows = -(-len(lengths) // count)
    length = max([1, *lengths])
    if _needs_equal_tokens(parallel):
        num_rows, length = all_reduce_max(num_rows, parallel), all_reduce_max(length, parallel)
    length = round_up(length, parallel.dims.token_multiple)
    rows = range(len(lengths))
    return [
        padded_layout(rows[i * num_rows : (i + 1) * num_rows], lengths, num_rows, length, width)
        for i in range(count)
    ]


def _packed_layouts(
    lengths: Sequence[int], max_tokens: int, width: int, parallel: ParallelContext
) -> list[Layout]:
    dims = parallel.dims
    multiple, whole = dims.sequence_multiple, dims.token_multiple
    assert max_tokens % whole == 0, f"max_tokens={max_tokens} is no multiple of {whole}"
    padded = [round_up(length, multiple) for length in lengths]
    speaks = parallel.tensor_rank == parallel.context_rank == parallel.pipeline_rank == 0
    if speaks and max(padded) > max_tokens:
        warnings.warn(  # the same words each time, so that Python says them once
            f"sequences longer than train.max_tokens_per_micro_batch={max_tokens} run alone and need more "
            "memory",
            stacklevel=2,
        )
    count = _equal_count(len(pack(padded, max_tokens)), parallel)
    bins = [[row for row in part if lengths[row]] for part in pack_into(padded, max_tokens, count)]
    sizes = [round_up(max(1, sum(padded[row] for row in part)), whole) for part in bins]
    if _needs_equal_tokens(parallel):
        sizes = [all_reduce_max(max(sizes), parallel)] * count
    elif dims.pipeline > 1:  # stages exchange hidden states of one shape
        sizes = [max(sizes)] * count
    return [
        packed_layout(part, lengths, multiple, length, width)
        for part, length in zip(bins, sizes, strict=True)
    ]


def _equal_count(needed: int, parallel: ParallelContext) -> int:
    count = max(1, all_reduce_max(needed, parallel))
    if parallel.dims.virtual_pipeline is not None:  # the interleaved schedule wants whole rounds
        count = round_up(count, parallel.dims.pipeline)
    return count


def _needs_equal_tokens(parallel: ParallelContext) -> bool:
    """Whether ranks gather the tokens of others for their experts: on a CPU (models/expert_config.py)."""
    return parallel.dims.expert * parallel.dims.expert_tensor > 1 and parallel.device.type == "cpu"


def _one_untrained_row(sequences: PaddedSequences) -> PaddedSequences:
    tensors = {f.name: getattr(sequences, f.name) for f in fields(sequences)}
    return sequences.with_fields(
        **{name: None if t is None else t.new_zeros((1, *t.shape[1:])) for name, t in tensors.items()}
    )
