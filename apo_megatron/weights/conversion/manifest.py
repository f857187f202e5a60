"""What a conversion read: every source tensor with its digest, and where it went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

import apo_megatron
from apo_megatron.errors import CheckpointError
from apo_megatron.weights.formats.safetensors_writer import tensor_bytes

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


def digest(tensor: Tensor) -> str:
    """xxh3-128 of the tensor's bytes, in hexadecimal: finds damage, not forgery."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json has it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the Hugging Face checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    # The tensor of the Megatron checkpoint that it is part of, and the place in the stack; None: left out.
    key: str | None
    index: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The source tensors by name."""

    model_type: str
    tensors: Mapping[str, SourceTensor]

    def save(self, folder: Path) -> None:
        content = {
            "format_version": FORMAT_VERSION,
            "apo_megatron": apo_megatron.__version__,
            "digest": "xxh3-128",
            "model_type": self.model_type,
            "tensors": {name: asdict(self.tensors[name]) for name in sorted(self.tensors)},
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a converted checkpoint; None where there is none (a training checkpoint).

    Raises CheckpointError where it is newer than this program, or not a manifest.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {version}, but this apo_megatron reads versions up to "
                f"{FORMAT_VERSION}: install a newer one"
            )
        tensors = {name: _source_tensor(entry) for name, entry in content["tensors"].items()}
        return Manifest(content["model_type"], tensors)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a manifest of a conversion ({error!r})") from None


def _source_tensor(entry: Mapping[str, Any]) -> SourceTensor:
    return SourceTensor(
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        digest=entry["digest"],
        key=entry["key"],
        index=tuple(entry["index"]),
    )
