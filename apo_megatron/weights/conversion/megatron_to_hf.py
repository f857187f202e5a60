"""A Megatron checkpoint as a Hugging Face checkpoint: a parameter at a time, divided over ranks, no model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.parallel.world import World
from apo_megatron.weights.conversion.manifest import digest
from apo_megatron.weights.conversion.megatron_source import MegatronSource
from apo_megatron.weights.conversion.streaming import (
    Progress,
    divide_by_size,
    memory_bound,
    no_progress,
    read_ahead,
)
from apo_megatron.weights.formats.hf_checkpoint import MAX_SHARD_BYTES, finish_hf_checkpoint
from apo_megatron.weights.formats.output_directory import check_output, written_aside
from apo_megatron.weights.formats.safetensors_writer import ShardPlan, ShardWriter, plan_shards
from apo_megatron.weights.rules import WeightEntry


@dataclass(frozen=True)
class _Group:
    """The tensors of one parameter."""

    entry: WeightEntry
    dtype: torch.dtype  # as written
    num_bytes: int  # as read or as written, whichever is more
    cost: int  # what is held at most while they are worked on


def megatron_to_hf(
    megatron_path: str | Path,
    hf_path: str | Path,
    world: World,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write a Megatron checkpoint, converted or from training, as a Hugging Face checkpoint. Collective.

    Returns the bytes of the weights. ``dtype`` None keeps every tensor's own; what is float32 in a model of
    any dtype stays so. A tensor of a converted
    checkpoint that is not what was converted (by the digests of its manifest) is a CheckpointError.
    Everything else is checked before tensors are read: raises ConfigError or CheckpointError. ``hf_path``
    appears complete or not at all.
    """
    target = Path(hf_path)
    with MegatronSource(megatron_path, config_from) as source:
        groups = [_group(source, entry, dtype) for entry in source.entries]
        plans = plan_shards((source.specs(group.entry, group.dtype) for group in groups), max_shard_bytes)
        num_bytes = sum(plan.num_bytes for plan in plans)
        check_output(target, num_bytes, overwrite, [source.folder, source.config_dir])
        my_plans = divide_by_size(plans, lambda plan: plan.num_bytes, world.world)[world.rank]
        by_plan = _by_plan(my_plans, groups)
        mine = [group for plan_groups in by_plan.values() for group in plan_groups]
        max_bytes = memory_bound(group.num_bytes for group in groups)
        total = sum(group.num_bytes for group in mine)
        with written_aside(target, world) as folder:
            results = read_ahead(mine, lambda g: _read(source, g.entry, g.dtype), lambda g: g.cost, max_bytes)
            with closing(results):
                for plan in my_plans:
                    with ShardWriter(folder / plan.file, plan) as writer:
                        for group in by_plan[plan.file]:
                            writer.write_all(next(results))
                            progress(group.num_bytes, total)
            if world.is_main:
                finish_hf_checkpoint(folder, plans, source.config_dir)
    return num_bytes


def _group(source: MegatronSource, entry: WeightEntry, dtype: torch.dtype | None) -> _Group:
    stored = source.reader.dtype(entry.stored)
    written = stored if dtype is None or entry.keeps_dtype else dtype
    num_bytes = max(stored.itemsize, written.itemsize) * sum(
        torch.Size(shape).numel() for shape in entry.layout.hf_shapes
    )
    # Taken apart, put together or converted, it is there twice.
    is_copied = len(entry.hf_names) > 1 or written != stored or not source.is_one_piece(entry)
    return _Group(entry, written, num_bytes, 2 * num_bytes if is_copied else num_bytes)


def _by_plan(plans: Sequence[ShardPlan], groups: Sequence[_Group]) -> dict[str, list[_Group]]:
    """The groups of each file."""
    file_of = {spec.name: plan.file for plan in plans for spec in plan.specs}
    by_plan: dict[str, list[_Group]] = {plan.file: [] for plan in plans}
    for group in groups:
        file = file_of.get(group.entry.hf_names[0])
        if file is not None:  # else another rank's
            by_plan[file].append(group)
    return by_plan


def _read(source: MegatronSource, entry: WeightEntry, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of a parameter, compared with the manifest. Raises CheckpointError."""
    tensors = entry.to_hf([source.read(entry)])
    for name, tensor in tensors:
        if source.manifest is not None and digest(tensor) != source.manifest.tensors[name].digest:
            raise CheckpointError(
                f"{source.folder}: {name} (in {entry.stored.key} at {list(entry.stored.index)}) is not what "
                "was converted: its digest differs from the manifest's. The checkpoint is damaged; convert "
                "it anew from its source"
            )
    return [(name, tensor.to(dtype)) for name, tensor in tensors]
