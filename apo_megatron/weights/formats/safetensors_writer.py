"""Writing safetensors files tensor by tensor: the header is known before the first byte of a tensor is.

The format (a length, a JSON header, the bytes of all tensors): https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from apo_megatron.weights.formats.durable_file import DurableFile
from apo_megatron.weights.formats.safetensors_io import SINGLE_FILE, WEIGHT_DTYPES
from apo_megatron.weights.layouts import Shape

_DTYPE_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written; fp32, fp16 or bf16."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardPlan:
    """One file of a checkpoint, and its tensors in the order in which they lie in it."""

    file: str
    specs: tuple[TensorSpec, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the first tensor."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in self.specs:
            start, end = end, end + spec.num_bytes
            entries[spec.name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, without the header."""
        return sum(spec.num_bytes for spec in self.specs)


def plan_shards(groups: Iterable[Sequence[TensorSpec]], max_shard_bytes: int) -> list[ShardPlan]:
    """Divide tensors over files of at most ``max_shard_bytes``, in the given order.

    Tensors of one group go into one file; a group that is larger is a file of its own. Within a file wider
    dtypes come first, so that every tensor is aligned.
    """
    shards: list[list[TensorSpec]] = [[]]
    held_bytes = 0
    for group in groups:
        group_bytes = sum(spec.num_bytes for spec in group)
        if shards[-1] and held_bytes + group_bytes > max_shard_bytes:
            shards.append([])
            held_bytes = 0
        shards[-1] += group
        held_bytes += group_bytes
    return [
        ShardPlan(
            SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors",
            tuple(sorted(specs, key=lambda spec: -spec.dtype.itemsize)),
        )
        for number, specs in enumerate(shards, start=1)
    ]


class ShardWriter:
    """Writes one planned file; its tensors may come in any order. Use as a context manager.

    Leaving the block without an error makes the file durable, and fails (AssertionError) where a tensor of
    the plan was not written. Raises OSError, with the file's name, where the disk is full.
    """

    def __init__(self, path: str | Path, plan: ShardPlan) -> None:
        self._specs = {spec.name: spec for spec in plan.specs}
        self._offsets = dict(_offsets(plan))
        self._file = DurableFile(Path(path))
        self._file.write([plan.header], 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the plan, from any device; each exactly once."""
        spec, offset = self._specs[name], self._offsets.pop(name)
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, (name, tensor.shape, spec)
        self._file.write([tensor_bytes(tensor)], offset)

    def write_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """``write`` each of them."""
        for name, tensor in tensors:
            self.write(name, tensor)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)
        assert kind is not None or not self._offsets, f"never written: {sorted(self._offsets)[:5]}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _offsets(plan: ShardPlan) -> Iterator[tuple[str, int]]:
    offset = len(plan.header)
    for spec in plan.specs:
        yield spec.name, offset
        offset += spec.num_bytes
