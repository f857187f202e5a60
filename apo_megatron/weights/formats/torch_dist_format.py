"""What a Megatron distributed checkpoint ("torch_dist") consists of, beside its tensors.

The format is that of torch.distributed.checkpoint: ``.metadata`` says for every chunk of every tensor in
which file, from where and how long it lies; there it is what torch.save makes of the chunk. metadata.json
and common.pt are Megatron's additions.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from apo_megatron.errors import CheckpointError
from apo_megatron.weights.formats.torch_archive import UNPICKLING_ERRORS
from apo_megatron.weights.layouts import Shape
from apo_megatron.weights.rules import StoredTensor

CONFIG_FILE = "metadata.json"
METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# All that the pickle of .metadata may name; beside them torch's dtypes.
_PLAIN_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor: where it lies in the tensor, and where on the disk."""

    key: str
    start: Shape
    shape: Shape
    dtype: torch.dtype
    file: str
    offset: int
    num_bytes: int  # in the file


def box_of(stored: StoredTensor, shape: Shape) -> tuple[Shape, Shape]:
    """Start and shape, within the stored tensor, of a parameter of ``shape``."""
    return (*stored.index, *(0 for _ in shape)), (*(1 for _ in stored.index), *shape)


def write_metadata(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Write everything but the tensors, given the chunks that all ranks have written."""
    by_key: defaultdict[str, list[Chunk]] = defaultdict(list)
    for chunk in sorted(chunks, key=lambda chunk: (chunk.key, chunk.start)):
        by_key[chunk.key].append(chunk)
    tensors, places = {}, {}
    for key, parts in by_key.items():
        ends = zip(*([a + b for a, b in zip(c.start, c.shape, strict=True)] for c in parts), strict=True)
        tensors[key] = TensorStorageMetadata(
            TensorProperties(parts[0].dtype),
            torch.Size(max(positions) for positions in ends),
            [ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.shape)) for c in parts],
        )
        for chunk in parts:
            place = _StorageInfo(chunk.file, chunk.offset, chunk.num_bytes)
            places[MetadataIndex(key, chunk.start)] = place
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(Metadata(tensors, storage_data=places), file)  # type: ignore[arg-type]
    torch.save({}, folder / COMMON_FILE)
    # Last, as in Megatron: it is what makes the folder a checkpoint.
    (folder / CONFIG_FILE).write_text(json.dumps(_CONFIG), encoding="utf-8")


def read_chunks(folder: Path, *, tensors_only: bool = False) -> dict[str, list[Chunk]]:
    """The chunks of every tensor of a checkpoint, by key; what is not a tensor is left out.

    Raises CheckpointError where ``folder`` is not such a checkpoint, or its ``.metadata`` is damaged or names
    anything that is not part of the format (it is a pickle, which could otherwise run any code), and, with
    ``tensors_only``, where it holds anything but tensors: torch unpickles whatever else it is asked to load.
    """
    _check_config(folder / CONFIG_FILE)
    path = folder / METADATA_FILE
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes()), path).load()
        entries = {k: e for k, e in metadata.state_dict_metadata.items() if type(e) is TensorStorageMetadata}
        others = sorted(str(key) for key in metadata.state_dict_metadata.keys() - entries.keys())
        if tensors_only and others:
            raise CheckpointError(
                f"{path}: {', '.join(others[:3])} is no tensor, which a training checkpoint never holds: it "
                "was not opened, and should not be by anything else"
            )
        return {
            key: [_chunk(key, chunk, entry, metadata.storage_data) for chunk in entry.chunks]
            for key, entry in entries.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete") from None
    except UNPICKLING_ERRORS as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _chunk(key: str, chunk: ChunkStorageMetadata, entry: TensorStorageMetadata, places: Any) -> Chunk:
    place = places[MetadataIndex(key, chunk.offsets)]
    if Path(place.relative_path).name != place.relative_path:
        raise CheckpointError(f"{METADATA_FILE}: {key} lies in {place.relative_path}, outside the folder")
    start, shape, dtype = tuple(chunk.offsets), tuple(chunk.sizes), entry.properties.dtype
    numbers = (*start, *shape, place.offset, place.length)
    if len(start) != len(shape) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(f"{key} has a chunk at {numbers}")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has the dtype {dtype!r}")
    return Chunk(key, start, shape, dtype, place.relative_path, place.offset, place.length)


def _check_config(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent}: not a Megatron distributed checkpoint ({CONFIG_FILE} is missing)"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    wanted = {name: _CONFIG[name] for name in ("sharded_backend", "sharded_backend_version")}
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in wanted.items()):
        raise CheckpointError(f"{path}: format {found} found, {wanted} can be read")


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PLAIN_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._path}: names {module}.{name}, which no checkpoint needs: it was not opened, and should "
            "not be by anything else"
        )
