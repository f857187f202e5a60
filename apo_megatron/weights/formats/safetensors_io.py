"""Reading safetensors checkpoints: one file, or several with an index."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.weights.formats.mapped_file import map_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The dtypes in which weights are kept, by their names in the file.
WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Location:
    """Where a tensor lies, from the header of its file."""

    file: str
    dtype: str  # as the format calls it
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class SafetensorsReader:
    """Names, shapes and tensors of a checkpoint directory.

    Headers of all files are read and checked at once. ``tensor`` reads what is touched, so slicing reads
    the slice; ``read`` reads all of it at once. Use as a context manager. Reading may be done by another
    thread.

    Raises CheckpointError, naming the file, where files are missing, truncated or contradict the index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._locations: dict[str, _Location] = {}
        self._handles: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        for file, indexed_names in self._files().items():
            self._handles[file] = self._open(self.folder / file)
            found = {location[0]: location[1] for location in _read_header(self.folder / file)}
            if indexed_names is not None and (missing := sorted(indexed_names - found.keys())):
                raise CheckpointError(
                    f"{self.folder / file}: {INDEX_FILE} says it holds {', '.join(missing[:5])}, but it does "
                    f"not ({len(missing)} missing): the files are of different versions; fetch them again"
                )
            if twice := sorted(found.keys() & self._locations.keys()):
                raise CheckpointError(
                    f"{self.folder / file}: {', '.join(twice[:5])} is in {self._locations[twice[0]].file} "
                    "too: the files are of different versions; fetch them again"
                )
            self._locations |= found

    def _files(self) -> dict[str, set[str] | None]:
        """File name -> the tensor names that the index promises (None without an index)."""
        if (self.folder / SINGLE_FILE).exists():  # goes first, as in transformers
            return {SINGLE_FILE: None}
        index = self.folder / INDEX_FILE
        if not index.exists():
            raise CheckpointError(
                f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} found; weights must be in "
                "safetensors format"
            )
        files: dict[str, set[str] | None] = {}
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for file in sorted({os.fspath(file) for file in weight_map.values()}):
                files[file] = {name for name, where in weight_map.items() if where == file}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
        for file in files:
            if Path(file).name != file or not (self.folder / file).exists():
                raise CheckpointError(
                    f"{self.folder / file}: listed in {INDEX_FILE} but missing; fetch the checkpoint again"
                )
        return files

    def _open(self, path: Path) -> Any:
        try:
            # The context is entered here and left in close(): tensors stay readable until then.
            return safe_open(path, framework="pt", device="cpu").__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: cannot be read as safetensors ({error}; {path.stat().st_size} bytes): the file is "
                "truncated or corrupt; fetch or save it again"
            ) from None

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._locations)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return self._location(name).shape

    def num_bytes(self, name: str) -> int:
        """Size in the file."""
        return self._location(name).num_bytes

    def weight_dtype(self, name: str) -> torch.dtype:
        """fp32, fp16 or bf16; raises CheckpointError for tensors that are none of these."""
        location = self._location(name)
        if location.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{self.folder / location.file}: {name} has the dtype {location.dtype}; expected "
                f"{', '.join(WEIGHT_DTYPES)}. Quantized weights must be turned back into one of these first"
            )
        return WEIGHT_DTYPES[location.dtype]

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, in the dtype of the file; read lazily."""
        return self._handles[self._location(name).file].get_tensor(name)

    def read(self, name: str) -> Tensor:
        """A tensor that ``weight_dtype`` accepts, in memory only as long as it is used (``map_tensor``).

        ``tensor`` maps whole files, which stay in memory as far as they were touched. Raises CheckpointError
        where bytes are missing.
        """
        location, dtype = self._location(name), self.weight_dtype(name)
        descriptor = self._descriptor(location.file)
        try:
            return map_tensor(descriptor, location.offset, location.num_bytes, dtype, location.shape)
        except EOFError as error:
            raise CheckpointError(
                f"{self.folder / location.file}: ended before {name} ({error}): the file has changed"
            ) from None

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._descriptors[file]

    def _location(self, name: str) -> _Location:
        if name not in self._locations:
            raise CheckpointError(f"{self.folder}: no tensor named {name} in the checkpoint")
        return self._locations[name]

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].__exit__(None, None, None)
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _read_header(path: Path) -> Iterator[tuple[str, _Location]]:
    """(name, location) of every tensor of a file that ``safe_open`` has accepted."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield (
            name,
            _Location(path.name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start),
        )
