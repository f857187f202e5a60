"""Whether a Megatron checkpoint holds exactly the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.weights.completeness import check_checkpoint
from apo_megatron.weights.conversion.manifest import digest, dtype_name
from apo_megatron.weights.conversion.megatron_source import MegatronSource
from apo_megatron.weights.conversion.streaming import (
    Progress,
    divide_by_size,
    memory_bound,
    no_progress,
    read_ahead,
)
from apo_megatron.weights.formats.safetensors_io import SafetensorsReader
from apo_megatron.weights.rules import WeightEntry
from apo_megatron.weights.table import build_table


@dataclass(frozen=True)
class Verification:
    """What a comparison found. Names are those of the Hugging Face checkpoint."""

    num_tensors: int
    num_bytes: int  # of the source tensors
    has_manifest: bool
    changed_sources: tuple[str, ...]  # not what the manifest says was converted
    differing: tuple[str, ...]  # not in the Megatron checkpoint as in the source, and how they differ

    @property
    def is_proven(self) -> bool:
        """Every tensor is there, bit for bit."""
        return not self.changed_sources and not self.differing


@dataclass(frozen=True)
class _Source:
    """A tensor of the Hugging Face checkpoint, without its bytes."""

    digest: str
    dtype: str


def verify_conversion(
    hf_path: str | Path, megatron_path: str | Path, world: World, progress: Progress = no_progress
) -> Verification:
    """Read both checkpoints and compare every tensor by its digest, and with the manifest. Collective.

    A checkpoint of a training run has no manifest; it is compared with the source alone. Raises ConfigError,
    WeightMappingError or CheckpointError where one of the two is not complete or they are of different
    models: then there is nothing to compare.
    """
    with SafetensorsReader(resolve_model_path(hf_path)) as reader, MegatronSource(megatron_path) as source:
        check_checkpoint(reader, build_table(source.architecture))
        groups = [(entry, sum(map(reader.num_bytes, entry.hf_names))) for entry in source.entries]
        mine = divide_by_size(groups, lambda group: group[1], world.world)[world.rank]
        total = sum(num_bytes for _, num_bytes in mine)
        changed, differing = [], []

        def read(group: tuple[WeightEntry, int]) -> tuple[dict[str, _Source], Tensor]:
            # One after the other: neither the tensors nor both sides are held together.
            originals = {name: _read_source(reader, name) for name in group[0].hf_names}
            return originals, source.read(group[0])

        results = read_ahead(mine, read, lambda g: 2 * g[1], memory_bound(size for _, size in groups))
        with closing(results):
            for entry, num_bytes in mine:
                originals, whole = next(results)
                changed += [name for name, found in originals.items() if _has_changed(source, name, found)]
                for name, tensor in entry.to_hf([whole]):
                    if problem := _difference(originals[name], tensor):
                        differing.append(f"{name} ({problem})")
                progress(num_bytes, total)
        found = all_gather_objects((changed, differing), world)
        return Verification(
            num_tensors=sum(len(entry.hf_names) for entry, _ in groups),
            num_bytes=sum(num_bytes for _, num_bytes in groups),
            has_manifest=source.manifest is not None,
            changed_sources=tuple(sorted(name for names, _ in found for name in names)),
            differing=tuple(sorted(name for _, names in found for name in names)),
        )


def _read_source(reader: SafetensorsReader, name: str) -> _Source:
    tensor = reader.read(name)
    return _Source(digest(tensor), dtype_name(tensor.dtype))


def _has_changed(source: MegatronSource, name: str, found: _Source) -> bool:
    return source.manifest is not None and source.manifest.tensors[name].digest != found.digest


def _difference(original: _Source, tensor: Tensor) -> str:
    """What differs, "" for nothing."""
    dtype = dtype_name(tensor.dtype)
    if dtype != original.dtype:
        return f"{original.dtype} there, {dtype} here"
    return "" if digest(tensor) == original.digest else "other values"


def require_proof(verification: Verification, hf_path: str | Path, megatron_path: str | Path) -> None:
    """Raises CheckpointError naming the tensors that differ."""
    if verification.is_proven:
        return
    problems = []
    for names, problem in (
        (verification.changed_sources, f"tensors of {hf_path} are not what was converted (by the manifest)"),
        (verification.differing, f"tensors of {megatron_path} are not those of {hf_path}"),
    ):
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            problems.append(f"{len(names)} of {verification.num_tensors} {problem}: {shown}")
    raise CheckpointError("; ".join(problems) + ". Convert again from the checkpoint that is right")
