"""Cuts sequences into micro-batches of one shape, equally many on every rank."""

from __future__ import annotations

from dataclasses import fields

import torch

from apo_megatron.parallel.collectives import all_reduce_max
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import MicroBatch


def split_into_micro_batches(
    sequences: MicroBatch, micro_batch_size: int, parallel: ParallelContext
) -> list[MicroBatch]:
    """Micro-batches of exactly ``micro_batch_size`` rows, in order. Collective over all ranks.

    Every rank gets the same number (unequal counts hang pipelines), at least one; the rows that are
    missing are fully masked. Padding beyond this rank's longest sequence is cut off; where ranks gather
    tokens for their experts, beyond that of all ranks.
    """
    needed = -(-sequences.num_sequences // micro_batch_size)
    count = max(1, all_reduce_max(needed, parallel))
    if parallel.dims.virtual_pipeline is not None:  # the interleaved schedule wants whole rounds
        count = -(-count // parallel.dims.pipeline) * parallel.dims.pipeline
    length = _used_length(sequences, parallel)
    padded = _with_padding_rows(sequences, count * micro_batch_size, length)
    rows = torch.arange(count * micro_batch_size, device=sequences.tokens.device)
    return [padded.select(part) for part in rows.split(micro_batch_size)]


def _used_length(sequences: MicroBatch, parallel: ParallelContext) -> int:
    multiple = parallel.dims.tensor if parallel.dims.sequence_parallel else 1
    positions = sequences.loss_mask.any(dim=0).nonzero()
    used = int(positions[-1]) + 1 if len(positions) else 1
    if parallel.dims.expert * parallel.dims.expert_tensor > 1:
        used = all_reduce_max(used, parallel)
    return -(-used // multiple) * multiple


def _with_padding_rows(sequences: MicroBatch, num_rows: int, length: int) -> MicroBatch:
    missing = num_rows - sequences.num_sequences
    values = {}
    for item in fields(MicroBatch):
        tensor = getattr(sequences, item.name)
        if tensor is None:
            continue
        tensor = tensor[:, :length]
        if tensor.shape[1] < length:  # a rank with short sequences, or none
            shape = (tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=1)
        padding = tensor.new_zeros((missing, *tensor.shape[1:]))
        values[item.name] = torch.cat([tensor, padding]) if missing else tensor
    return MicroBatch(**values)
