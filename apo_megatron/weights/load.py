"""Hugging Face weights into this rank's part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.nn import Module, Parameter

from apo_megatron.errors import WeightMappingError
from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.safetensors_io import SafetensorsReader
from apo_megatron.weights.table import WeightTable, build_table, with_global_numbers


def named_entries(
    model_chunks: Sequence[Module], table: WeightTable
) -> Iterator[tuple[WeightEntry, Parameter]]:
    """(table entry, parameter) for every parameter of this rank, in model order.

    ``model_chunks`` may be wrapped (DistributedDataParallel). Raises WeightMappingError for a parameter
    without a rule.
    """
    for chunk in unwrap_model(list(model_chunks)):
        global_layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            yield table.lookup(with_global_numbers(name, global_layers)), parameter


def table_of(model_chunks: Sequence[Module], architecture: Architecture) -> WeightTable:
    """The weight table with this model's padded vocabulary."""
    return build_table(architecture, unwrap_model(list(model_chunks))[0].vocab_size)


def load_hf_weights(
    model_chunks: Sequence[Module], architecture: Architecture, hf_path: str | Path, parallel: ParallelContext
) -> None:
    """Fill every parameter of this rank from a Hugging Face checkpoint, converting to its dtype.

    Each rank reads only its slices. All names and shapes are checked before a byte is copied: raises
    WeightMappingError naming the tensors that are missing, left over or of the wrong shape, CheckpointError
    where files are missing or truncated.
    """
    table = table_of(model_chunks, architecture)
    tp_rank, tp_size = parallel.tensor_rank, parallel.dims.tensor
    with SafetensorsReader(resolve_model_path(hf_path)) as reader:
        check_checkpoint(reader, table)
        mine = list(named_entries(model_chunks, table))
        for entry, parameter in mine:
            entry.check_local_shape(tuple(parameter.shape), tp_size)
        with torch.no_grad():
            for entry, parameter in mine:
                full: list[Tensor] = [reader.tensor(name) for name in entry.hf_names]
                parameter.copy_(entry.to_megatron(full, tp_rank, tp_size))


def check_checkpoint(reader: SafetensorsReader, table: WeightTable) -> None:
    """Compare names and shapes of a checkpoint with the table; reads no tensor.

    Raises WeightMappingError naming what is missing, left over or of the wrong shape.
    """
    found = set(reader.names())
    wanted = {name for entry in table.entries() for name in entry.hf_names}
    left_over = {name for name in found - wanted if not _is_ignored(name, wanted)}
    for problem, names in (("missing", wanted - found), ("left over, no parameter takes them", left_over)):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
            raise WeightMappingError(
                f"{reader.folder}: {len(names)} tensors {problem}: {shown}. config.json and weights are of "
                "different models, or the model has parts that are not supported"
            )
    for entry in table.entries():
        entry.check_hf_shapes([reader.shape(name) for name in entry.hf_names])


def _is_ignored(name: str, wanted: set[str]) -> bool:
    """Rotary frequencies are computed; a tied model's lm_head is a copy of its embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in wanted)
