"""Weights from a checkpoint, of Hugging Face or of Megatron, into this rank's part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import read_architecture, resolve_model_path
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.completeness import check_checkpoint
from apo_megatron.weights.conversion.megatron_source import MegatronSource
from apo_megatron.weights.formats.safetensors_io import SafetensorsReader
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.table import WeightTable, build_table, with_global_numbers


def named_weights(model_chunks: Sequence[Module]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer of this rank, chunk by chunk in model order.

    Names have global layer numbers, but this rank's own expert numbers. ``model_chunks`` may be wrapped
    (DistributedDataParallel).
    """
    for chunk in unwrap_model(list(model_chunks)):
        global_layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        saved = chunk.state_dict().keys()  # without what is computed, such as rotary frequencies
        buffers = [(name, buffer) for name, buffer in chunk.named_buffers() if name in saved]
        for name, tensor in [*chunk.named_parameters(), *buffers]:
            yield with_global_numbers(name, global_layers), tensor


def named_entries(
    model_chunks: Sequence[Module], table: WeightTable, parallel: ParallelContext
) -> Iterator[tuple[WeightEntry, Tensor]]:
    """(table entry, tensor) of every parameter and persistent buffer of this rank, as ``named_weights``.

    Raises WeightMappingError for one without a rule.
    """
    first_expert = parallel.expert_rank * (table.num_experts // parallel.dims.expert)
    all_layers = range(table.num_layers)
    for name, tensor in named_weights(model_chunks):
        yield table.lookup(with_global_numbers(name, all_layers, first_expert)), tensor


def shard_of(entry: WeightEntry, parallel: ParallelContext) -> tuple[int, int]:
    """(rank, size) on the axis that the parameter is cut over."""
    if entry.is_expert:
        return parallel.expert_tensor_rank, parallel.dims.expert_tensor
    return parallel.tensor_rank, parallel.dims.tensor


def table_of(model_chunks: Sequence[Module], architecture: Architecture) -> WeightTable:
    """The weight table with this model's padded vocabulary."""
    return build_table(architecture, unwrap_model(list(model_chunks))[0].vocab_size)


def load_hf_weights(
    model_chunks: Sequence[Module], architecture: Architecture, hf_path: str | Path, parallel: ParallelContext
) -> None:
    """Fill every weight of this rank from a Hugging Face checkpoint, converting to its dtype.

    Each rank reads only its slices. All names and shapes are checked before a byte is copied: raises
    WeightMappingError naming the tensors that are missing, left over or of the wrong shape, CheckpointError
    where files are missing or truncated.
    """
    table = table_of(model_chunks, architecture)
    with SafetensorsReader(resolve_model_path(hf_path)) as reader:
        check_checkpoint(reader, table)
        mine = list(named_entries(model_chunks, table, parallel))
        for entry, weight in mine:
            entry.check_local_shape(tuple(weight.shape), shard_of(entry, parallel)[1])
        with torch.no_grad():
            for entry, weight in mine:
                full: list[Tensor] = [reader.tensor(name) for name in entry.hf_names]
                weight.copy_(entry.to_megatron(full, *shard_of(entry, parallel)))


def load_megatron_weights(
    model_chunks: Sequence[Module],
    architecture: Architecture,
    megatron_path: str | Path,
    parallel: ParallelContext,
) -> None:
    """Fill every weight of this rank from a Megatron checkpoint of any layout, converting to its dtype.

    The checkpoint is one that was converted, or one of a training run. Rows that pad the vocabulary are
    zero. Everything is checked before a byte is copied: raises CheckpointError where the checkpoint is
    damaged, not complete or of another model than ``architecture``.
    """
    with MegatronSource(megatron_path) as source:
        _check_same_model(source, architecture)
        table = table_of(model_chunks, architecture)
        stored = {entry.hf_names: entry for entry in source.entries}  # a tied output layer has none
        mine = list(named_entries(model_chunks, table, parallel))
        for entry, weight in mine:
            entry.check_local_shape(tuple(weight.shape), shard_of(entry, parallel)[1])
        with torch.no_grad():
            for entry, weight in mine:
                whole = stored[entry.hf_names]
                full = [tensor for _, tensor in whole.to_hf([source.read(whole)])]
                weight.copy_(entry.to_megatron(full, *shard_of(entry, parallel)))


def _check_same_model(source: MegatronSource, architecture: Architecture) -> None:
    there, here = asdict(read_architecture(source.config_dir)), asdict(architecture)
    differing = [
        f"{name}: {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]
    ]
    if differing:
        raise CheckpointError(
            f"{source.folder} is of another model than model.hf_path ({'; '.join(differing)}): name the "
            "model that it was converted from, or convert the other"
        )
