"""Streams the sharded model as full Hugging Face tensors to every rank, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.load import named_entries, table_of
from apo_megatron.weights.rules import WeightEntry

NamedTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Bucket:
    """Parameters of one pipeline stage and one dtype that travel together in one flat buffer."""

    stage: int
    dtype: torch.dtype
    entries: tuple[WeightEntry, ...]


class WeightSource:
    """The policy's current weights under their Hugging Face names.

    Collective: all ranks construct it together and iterate ``buckets()`` together. A bucket costs one
    broadcast (pipeline parallel) and one all-gather (tensor parallel), whatever the number of its
    tensors. It reads the live parameters, so each iteration gives the weights of its time.
    """

    def __init__(
        self,
        model_chunks: Sequence[Module],
        architecture: Architecture,
        parallel: ParallelContext,
        bucket_bytes: int = 512 * 2**20,
    ) -> None:
        """``bucket_bytes`` bounds the full tensors of a bucket; a larger tensor is a bucket of its own."""
        self.parallel = parallel
        self._tp_size = parallel.dims.tensor
        table = table_of(model_chunks, architecture)
        self._parameters: dict[str, Parameter] = {
            entry.megatron_name: parameter
            for entry, parameter in named_entries(model_chunks, table)
            if entry.exported
        }
        # Stages tell each other once what they hold; everything else follows from the table.
        mine = [(name, parameter.dtype) for name, parameter in self._parameters.items()]
        stages: list[list[tuple[str, torch.dtype]]] = [[] for _ in range(parallel.dims.pipeline)]
        dist.all_gather_object(stages, mine, group=parallel.pipeline_group)
        announced = [name for stage in stages for name, _ in stage]
        assert sorted(announced) == sorted(e.megatron_name for e in table.entries() if e.exported)
        self._plan = [
            bucket
            for stage, contents in enumerate(stages)
            for bucket in self._fill_buckets(
                stage, [(table.lookup(n), dtype) for n, dtype in contents], bucket_bytes
            )
        ]

    def buckets(self) -> Iterator[NamedTensors]:
        """Lists of (Hugging Face name, full tensor) on this rank's device, in parameter dtype.

        Deterministic order: stage by stage, in model order; a tied lm_head is left out. Tensors may share
        memory with the parameters or with each other: copy what is kept, write to none. At most about one
        bucket, and its sharded form, is in memory, if the caller drops each before it takes the next.
        """
        for bucket in self._plan:
            yield self._collect(bucket)

    def _fill_buckets(
        self, stage: int, contents: Sequence[tuple[WeightEntry, torch.dtype]], bucket_bytes: int
    ) -> Iterator[_Bucket]:
        held: list[WeightEntry] = []
        held_bytes, held_dtype = 0, None
        for entry, dtype in contents:
            size = self._local_numel(entry) * self._tp_size * dtype.itemsize
            if held and held_dtype is not None and (dtype != held_dtype or held_bytes + size > bucket_bytes):
                yield _Bucket(stage, held_dtype, tuple(held))
                held, held_bytes = [], 0
            held.append(entry)
            held_bytes, held_dtype = held_bytes + size, dtype
        if held_dtype is not None:
            yield _Bucket(stage, held_dtype, tuple(held))

    def _local_numel(self, entry: WeightEntry) -> int:
        return torch.Size(entry.local_shape(self._tp_size)).numel()

    @torch.no_grad()
    def _collect(self, bucket: _Bucket) -> NamedTensors:
        if self._tp_size == 1 and self.parallel.dims.pipeline == 1:  # nothing to send: no copies either
            return [
                pair
                for entry in bucket.entries
                for pair in entry.to_hf([self._parameters[entry.megatron_name].detach()])
            ]
        sizes = [self._local_numel(entry) for entry in bucket.entries]
        per_rank = self._all_gather(self._local_shards(bucket, sum(sizes)))
        shards_by_rank = [flat.split(sizes) for flat in per_rank]
        named: NamedTensors = []
        for entry, flat_shards in zip(bucket.entries, zip(*shards_by_rank, strict=True), strict=True):
            shape = entry.local_shape(self._tp_size)
            named += entry.to_hf([shard.view(shape) for shard in flat_shards])
        return named

    def _local_shards(self, bucket: _Bucket, num_elements: int) -> Tensor:
        """[num_elements]: this tensor rank's shards of the bucket, sent by the stage that owns them."""
        parallel = self.parallel
        if bucket.stage == parallel.pipeline_rank:
            flat = torch.cat([self._parameters[e.megatron_name].detach().flatten() for e in bucket.entries])
        else:
            flat = torch.empty(num_elements, dtype=bucket.dtype, device=parallel.device)
        if parallel.dims.pipeline > 1:
            # Before the gather over tensor ranks: each pipeline then sends only its own share.
            dist.broadcast(flat, group=parallel.pipeline_group, group_src=bucket.stage)
        return flat

    def _all_gather(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The flat shards of all tensor ranks, in rank order."""
        if self._tp_size == 1:
            return (flat,)
        gathered = flat.new_empty(self._tp_size * flat.numel())
        dist.all_gather_into_tensor(gathered, flat, group=self.parallel.tensor_group)
        return gathered.chunk(self._tp_size)
