"""Streams the sharded model as full Hugging Face tensors to every rank, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from apo_megatron.parallel.state import Group, ParallelContext
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.formats.safetensors_writer import TensorSpec
from apo_megatron.weights.load import named_weights, table_of
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.table import WeightTable, with_global_numbers

NamedTensors = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Slot:
    """A weight of this rank, and what it is on each rank of the expert axis: other experts, or itself."""

    name: str  # with this rank's own expert number
    entries: tuple[WeightEntry, ...]  # in expert-rank order; a single one for what is not an expert
    shape: tuple[int, ...]  # of one shard
    dtype: torch.dtype

    @property
    def is_expert(self) -> bool:
        return self.entries[0].is_expert

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class _Bucket:
    """Weights of one pipeline stage, one dtype and one set of axes that travel in one flat buffer."""

    stage: int
    slots: tuple[_Slot, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.slots[0].dtype

    @property
    def is_expert(self) -> bool:
        return self.slots[0].is_expert


class WeightSource:
    """The policy's current weights under their Hugging Face names.

    Collective: all ranks construct it together and iterate ``buckets()`` together. A bucket costs one
    broadcast (pipeline parallel) and one all-gather per axis that its weights are divided over (tensor; or
    expert-tensor and expert), whatever the number of its tensors. It reads the live weights, so each
    iteration gives those of its time.
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
        table = table_of(model_chunks, architecture)
        self._weights: dict[str, Tensor] = dict(named_weights(model_chunks))
        # Stages tell each other once what they hold; everything else follows from the table. Ranks of one
        # stage hold the same slots: experts differ, but each has as many as the next.
        mine = [(name, tensor.dtype) for name, tensor in self._weights.items()]
        stages: list[list[tuple[str, torch.dtype]]] = [[] for _ in range(parallel.dims.pipeline)]
        dist.all_gather_object(stages, mine, group=parallel.pipeline_group)
        self._plan: list[_Bucket] = []
        for stage, contents in enumerate(stages):
            slots = [self._slot(name, dtype, table) for name, dtype in contents]
            exported = [slot for slot in slots if slot.entries[0].exported]
            self._plan += _fill_buckets(stage, exported, bucket_bytes, self._num_shards)
        announced = [e.megatron_name for b in self._plan for slot in b.slots for e in slot.entries]
        assert sorted(announced) == sorted(e.megatron_name for e in table.entries() if e.exported)

    def buckets(self) -> Iterator[NamedTensors]:
        """Lists of (Hugging Face name, full tensor) on this rank's device, in parameter dtype.

        Deterministic order, whatever the bucket size: stage by stage, each with its experts last; a tied
        lm_head is left out. Tensors may share memory with the parameters or with each other: copy what is
        kept, write to none. At most about one bucket, and its sharded form, is in memory, if the caller
        drops each before it takes the next.
        """
        for bucket in self._plan:
            yield self._collect(bucket)

    def tensor_specs(self) -> list[TensorSpec]:
        """What ``buckets()`` gives, before it does."""
        return [
            TensorSpec(name, shape, slot.dtype)
            for bucket in self._plan
            for slot in bucket.slots
            for entry in slot.entries
            for name, shape in zip(entry.hf_names, entry.layout.hf_shapes, strict=True)
        ]

    def _slot(self, name: str, dtype: torch.dtype, table: WeightTable) -> _Slot:
        num_ranks = self.parallel.dims.expert
        per_rank = table.num_experts // num_ranks
        layers = range(table.num_layers)
        entries = [
            table.lookup(with_global_numbers(name, layers, rank * per_rank)) for rank in range(num_ranks)
        ]
        if not entries[0].is_expert:
            entries = entries[:1]
        return _Slot(name, tuple(entries), entries[0].local_shape(self._shard_axis(entries[0])[1]), dtype)

    def _shard_axis(self, entry: WeightEntry) -> tuple[Group, int]:
        """Group and size of the axis that an entry is cut over."""
        if entry.is_expert:
            return self.parallel.expert_tensor_group, self.parallel.dims.expert_tensor
        return self.parallel.tensor_group, self.parallel.dims.tensor

    def _num_shards(self, slot: _Slot) -> int:
        """Ranks that a slot is gathered from."""
        return self._shard_axis(slot.entries[0])[1] * len(slot.entries)

    @torch.no_grad()
    def _collect(self, bucket: _Bucket) -> NamedTensors:
        if self._num_shards(bucket.slots[0]) == 1 and self.parallel.dims.pipeline == 1:
            return [  # nothing to send: no copies either
                pair
                for slot in bucket.slots
                for pair in slot.entries[0].to_hf([self._weights[slot.name].detach()])
            ]
        flat = self._local_shards(bucket)
        shard_group, num_shards = self._shard_axis(bucket.slots[0].entries[0])
        flat = _all_gather(flat, shard_group, num_shards)  # [shards * elements]
        if bucket.is_expert:
            flat = _all_gather(flat, self.parallel.expert_group, self.parallel.dims.expert)
        sizes = [slot.numel for slot in bucket.slots]
        num_owners = len(bucket.slots[0].entries)
        by_owner = [owned.view(num_shards, -1).split(sizes, dim=1) for owned in flat.chunk(num_owners)]
        named: NamedTensors = []
        for index, slot in enumerate(bucket.slots):
            for entry, shards in zip(slot.entries, by_owner, strict=True):
                named += entry.to_hf([shard.view(slot.shape) for shard in shards[index]])
        return named

    def _local_shards(self, bucket: _Bucket) -> Tensor:
        """[elements]: this rank's shards of the bucket, sent by the stage that owns them."""
        parallel = self.parallel
        if bucket.stage == parallel.pipeline_rank:
            flat = torch.cat([self._weights[slot.name].detach().flatten() for slot in bucket.slots])
        else:
            num_elements = sum(slot.numel for slot in bucket.slots)
            flat = torch.empty(num_elements, dtype=bucket.dtype, device=parallel.device)
        if parallel.dims.pipeline > 1:
            # Before the gathers within a stage: each pipeline then sends only its own share.
            dist.broadcast(flat, group=parallel.pipeline_group, group_src=bucket.stage)
        return flat


def _fill_buckets(
    stage: int, slots: Sequence[_Slot], bucket_bytes: int, num_shards: Callable[[_Slot], int]
) -> Iterator[_Bucket]:
    """Slots in order, experts last, cut where dtype or axes change and before a bucket grows too large."""
    held: list[_Slot] = []
    held_bytes = 0
    for slot in sorted(slots, key=lambda slot: slot.is_expert):
        size = slot.numel * num_shards(slot) * slot.dtype.itemsize
        if held and (
            (slot.dtype, slot.is_expert) != (held[0].dtype, held[0].is_expert)
            or held_bytes + size > bucket_bytes
        ):
            yield _Bucket(stage, tuple(held))
            held, held_bytes = [], 0
        held.append(slot)
        held_bytes += size
    if held:
        yield _Bucket(stage, tuple(held))


def _all_gather(flat: Tensor, group: Group, size: int) -> Tensor:
    """``flat`` of every rank of ``group``, one after the other."""
    if size == 1:
        return flat
    gathered = flat.new_empty(size * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    return gathered
