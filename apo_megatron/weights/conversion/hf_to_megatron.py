"""A Hugging Face checkpoint as a Megatron checkpoint: a parameter at a time, divided over ranks, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import read_architecture, resolve_model_path
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.weights.completeness import check_checkpoint
from apo_megatron.weights.conversion.manifest import Manifest, SourceTensor, digest, dtype_name
from apo_megatron.weights.conversion.megatron_source import HF_FOLDER
from apo_megatron.weights.conversion.streaming import (
    Progress,
    divide_by_size,
    memory_bound,
    no_progress,
    read_ahead,
)
from apo_megatron.weights.formats.hf_checkpoint import copy_model_files
from apo_megatron.weights.formats.output_directory import check_output, written_aside
from apo_megatron.weights.formats.safetensors_io import SafetensorsReader
from apo_megatron.weights.formats.torch_dist_format import write_metadata
from apo_megatron.weights.formats.torch_dist_io import TorchDistWriter
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.table import build_table


def hf_to_megatron(
    hf_path: str | Path,
    megatron_path: str | Path,
    world: World,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write the checkpoint at ``hf_path`` (directory or hub id) as a Megatron checkpoint. Collective.

    Returns the bytes of the weights. What can be checked without reading tensors is checked first: raises
    ConfigError, WeightMappingError or CheckpointError where the source is not a complete checkpoint of a
    supported model or the target cannot take it. ``megatron_path`` appears complete or not at all.
    """
    source, target = resolve_model_path(hf_path), Path(megatron_path)
    architecture = read_architecture(source, weights_only=True)
    table = build_table(architecture)
    with SafetensorsReader(source) as reader:
        unneeded = check_checkpoint(reader, table)
        entries = [entry for entry in table.entries() if entry.exported]
        _check_dtypes(reader, entries)
        sizes = [sum(map(reader.num_bytes, entry.hf_names)) for entry in entries]
        check_output(target, sum(sizes), overwrite, [source])
        groups = list(zip(entries, sizes, strict=True))
        mine = divide_by_size(groups, lambda group: group[1], world.world)[world.rank]
        records: dict[str, SourceTensor] = {}
        with written_aside(target, world) as folder:
            with TorchDistWriter(folder / f"__{world.rank}_0.distcp") as writer:
                _stream(reader, writer, mine, records, memory_bound(sizes), progress)
            written = all_gather_objects((writer.chunks, records), world)
            if world.is_main:
                all_records = {name: record for _, part in written for name, record in part.items()}
                all_records |= _records_of_unneeded(reader, unneeded, all_records)
                Manifest(architecture.model_type, all_records).save(folder)
                (folder / HF_FOLDER).mkdir()
                copy_model_files(source, folder / HF_FOLDER)
                write_metadata(folder, [chunk for chunks, _ in written for chunk in chunks])
    return sum(sizes)


def _stream(
    reader: SafetensorsReader,
    writer: TorchDistWriter,
    groups: Sequence[tuple[WeightEntry, int]],
    records: dict[str, SourceTensor],
    max_bytes: int,
    progress: Progress,
) -> None:
    """Write the parameters of one rank, and fill in what was read."""

    def read(group: tuple[WeightEntry, int]) -> list[Tensor]:
        entry, tensors = group[0], []
        for name in entry.hf_names:
            tensors.append(reader.read(name))
            records[name] = _record(tensors[-1], entry)
        return entry.layout.pieces(tensors)

    total = sum(num_bytes for _, num_bytes in groups)
    with closing(read_ahead(groups, read, lambda group: group[1], max_bytes)) as results:
        for entry, num_bytes in groups:
            writer.write(entry.stored, entry.local_shape(1), next(results))
            progress(num_bytes, total)


def _check_dtypes(reader: SafetensorsReader, entries: Sequence[WeightEntry]) -> None:
    """A tensor of a Megatron checkpoint, which may hold all layers, has one dtype."""
    first: dict[str, str] = {}
    for entry in entries:
        for name in entry.hf_names:
            dtype = reader.weight_dtype(name)
            other = first.setdefault(entry.stored.key, name)
            if dtype != reader.weight_dtype(other):
                raise CheckpointError(
                    f"{reader.folder}: {name} is {dtype_name(dtype)} and {other} "
                    f"{dtype_name(reader.weight_dtype(other))}, but both become parts of "
                    f"{entry.stored.key}: bring the checkpoint to one dtype first"
                )


def _record(tensor: Tensor, entry: WeightEntry | None) -> SourceTensor:
    return SourceTensor(
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        digest=digest(tensor),
        key=entry.stored.key if entry else None,
        index=entry.stored.index if entry else (),
    )


def _records_of_unneeded(
    reader: SafetensorsReader, names: Sequence[str], records: Mapping[str, SourceTensor]
) -> dict[str, SourceTensor]:
    """Records of the tensors that are left out. Raises CheckpointError where one is needed after all."""
    found = {name: _record(reader.read(name), None) for name in names}
    head, embedding = found.get("lm_head.weight"), records["model.embed_tokens.weight"]
    if head is not None and (head.dtype, head.digest) != (embedding.dtype, embedding.digest):
        raise CheckpointError(
            f"{reader.folder}: config.json has tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight: remove it, or set tie_word_embeddings to false"
        )
    return found
