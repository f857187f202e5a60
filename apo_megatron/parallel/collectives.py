"""The collectives the rest of the program needs, by what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from apo_megatron.parallel.state import ParallelContext
from apo_megatron.parallel.world import World

T = TypeVar("T")


def all_reduce_max(value: int, parallel: World) -> int:
    """The largest ``value`` of all ranks."""
    tensor = torch.tensor(value, dtype=torch.int64, device=parallel.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=parallel.world_group)
    return int(tensor)


def any_rank(flag: bool, parallel: ParallelContext) -> bool:
    """True everywhere where it is True anywhere."""
    return bool(all_reduce_max(flag, parallel))


def all_gather_objects(value: T, parallel: World) -> list[T]:
    """``value`` of every rank, in rank order, on every rank (pickled between our own ranks only)."""
    if parallel.world == 1:
        return [value]
    gathered: list[Any] = [None] * parallel.world
    dist.all_gather_object(gathered, value, group=parallel.world_group)
    return gathered


def all_gather_arrays(
    parts: Sequence[np.ndarray], sizes: Sequence[int], dtype: np.dtype, parallel: World
) -> list[np.ndarray]:
    """What every rank has, 1-D ``parts`` one after the other, in rank order, on every rank.

    All know the ``sizes`` by rank, in elements.
    """
    # One collective of equal shares, each put together where it is sent from.
    share = np.empty(max(sizes), dtype)
    np.concatenate([share[:0], *parts], out=share[: sizes[parallel.rank]])
    if parallel.world == 1:
        return [share]
    sent = torch.from_numpy(share).to(parallel.device)
    gathered = sent.new_empty(parallel.world * len(share))
    dist.all_gather_into_tensor(gathered, sent, group=parallel.world_group)
    shares = gathered.cpu().numpy().reshape(parallel.world, -1)
    return [of_rank[:size] for of_rank, size in zip(shares, sizes, strict=True)]


def broadcast_from_main(value: T, parallel: World) -> T:
    """The main rank's ``value`` on every rank."""
    return all_gather_objects(value, parallel)[0]


def sum_over_data_parallel(values: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """``values`` summed in place over the ranks that have other sequences, within one pipeline stage."""
    dist.all_reduce(values, group=parallel.data_group)
    return values


def sum_over_data_and_context_parallel(values: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """``values`` summed in place over the ranks that train on other tokens, within one pipeline stage."""
    dist.all_reduce(values, group=parallel.data_context_group)
    return values


def sum_over_context_parallel(values: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """``values`` summed in place over the ranks that have other tokens of the same sequences."""
    dist.all_reduce(values, group=parallel.context_group)
    return values


def gather_over_data_parallel(values: torch.Tensor, parallel: ParallelContext) -> torch.Tensor:
    """``values`` [n] of the ranks that have other sequences, by rank: [sum of n], within one pipeline stage.

    On the device that ``values`` are on; n may differ by rank, and be 0.
    """
    num_ranks = parallel.dims.data
    if num_ranks == 1:
        return values
    sizes = torch.zeros(num_ranks, dtype=torch.int64, device=parallel.device)
    sizes[parallel.data_rank] = len(values)
    counts: list[int] = sum_over_data_parallel(sizes, parallel).tolist()
    if not any(counts):
        return values
    share = values.new_zeros(max(counts), device=parallel.device)
    share[: len(values)] = values
    gathered = share.new_empty(num_ranks * len(share))
    dist.all_gather_into_tensor(gathered, share, group=parallel.data_group)
    shares = gathered.to(values.device).split(len(share))
    return torch.cat([of_rank[:count] for of_rank, count in zip(shares, counts, strict=True)])


def broadcast_from_last_stage(value: T, parallel: ParallelContext) -> T:
    """The last stage's ``value`` on every stage of this rank's pipeline."""
    if parallel.dims.pipeline == 1:
        return value
    box = [value]
    dist.broadcast_object_list(
        box, src=parallel.last_stage_rank, group=parallel.pipeline_group, device=parallel.device
    )
    return box[0]


def barrier(parallel: World) -> None:
    """Wait for all ranks."""
    if parallel.world > 1:
        all_reduce_max(0, parallel)  # on this rank's own device, which dist.barrier would have to guess
