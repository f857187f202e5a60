"""Tensors of a Megatron distributed checkpoint, read and written one by one, without Megatron.

torch's own writer keeps every tensor until its file is complete, which no bound on memory allows, and its
reader copies everything twice.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from apo_megatron.errors import CheckpointError
from apo_megatron.weights.formats.durable_file import DurableFile
from apo_megatron.weights.formats.safetensors_writer import tensor_bytes
from apo_megatron.weights.formats.torch_archive import ArchiveError, map_saved_tensor, saved_around
from apo_megatron.weights.formats.torch_dist_format import Chunk, box_of, read_chunks
from apo_megatron.weights.layouts import Shape
from apo_megatron.weights.rules import StoredTensor


class TorchDistWriter:
    """Appends tensors to one file of a checkpoint; each rank has its own. Use as a context manager.

    Leaving the block without an error makes the file durable. Raises OSError, with the file's name, where
    the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.chunks: list[Chunk] = []  # what was written, for write_metadata
        self._file = DurableFile(path)
        self._end = 0

    def write(self, stored: StoredTensor, shape: Shape, pieces: Sequence[Tensor]) -> None:
        """Write one whole parameter: the values of all ``pieces``, which have one dtype, in a row."""
        start, chunk_shape = box_of(stored, shape)
        dtype, begin = pieces[0].dtype, self._end
        before, num_bytes, after = saved_around(chunk_shape, dtype)
        content = [tensor_bytes(piece) for piece in pieces]
        assert sum(map(len, content)) == num_bytes, (stored, shape, num_bytes)
        self._end = self._file.write([before, *content, after], begin)
        name = self._file.path.name
        self.chunks.append(Chunk(stored.key, start, chunk_shape, dtype, name, begin, self._end - begin))

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)


class TorchDistReader:
    """Parameters of a checkpoint, of any layout that Megatron wrote it in; ``close`` it when done.

    Reading may be done by another thread. Raises CheckpointError where the folder is not such a checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._chunks = read_chunks(self.folder)
        self._by_index: dict[tuple[str, int], dict[Shape, list[Chunk]]] = {}
        self._sizes: dict[str, int] = {}
        self._descriptors: dict[str, int] = {}

    def dtype(self, stored: StoredTensor) -> torch.dtype:
        return self._chunks[stored.key][0].dtype

    def num_chunks(self, stored: StoredTensor) -> int:
        return len(self._chunks_of(stored))

    def check(self, stored: StoredTensor, shape: Shape) -> None:
        """See that a parameter of ``shape`` can be read, without reading it.

        Rows beyond ``shape`` (a padded vocabulary) are allowed. Raises CheckpointError naming the tensor
        where it is missing, of another shape, not complete, or its file is missing or truncated.
        """
        if stored.key not in self._chunks:
            known = ", ".join(sorted(key for key in self._chunks if not key.startswith("optimizer.")))
            raise CheckpointError(
                f"{self.folder}: no tensor {stored.key}; it is a checkpoint of another model, or was written "
                f"in another form. It has {known[:600] or 'no tensors'}"
            )
        chunks = self._chunks_of(stored)
        start, wanted = box_of(stored, shape)
        whole = [max(ends) for ends in zip(*(_end(c) for c in self._chunks[stored.key]), strict=True)]
        full = (*stored.counts, *shape)
        rows = len(stored.counts)
        if len(whole) != len(full) or any(
            found != size and not (dim == rows and found > size)
            for dim, (found, size) in enumerate(zip(whole, full, strict=True))
        ):
            raise CheckpointError(
                f"{self.folder}: {stored.key} has the shape {whole}, {list(full)} expected from config.json: "
                "it is a checkpoint of another model"
            )
        if any(_overlap(a, b.start, b.shape) for a, b in combinations(chunks, 2)):
            raise CheckpointError(
                f"{self.folder}: parts of {stored.key} at {list(stored.index)} overlap; it is damaged"
            )
        covered = sum(_numel(box[1]) for box in (_overlap(c, start, wanted) for c in chunks) if box)
        if covered != _numel(wanted):
            raise CheckpointError(
                f"{self.folder}: {stored.key} at {list(stored.index)}: {covered} of {_numel(wanted)} "
                "elements are there; the checkpoint is incomplete"
            )
        for chunk in chunks:
            self._check_file(chunk)

    def _check_file(self, chunk: Chunk) -> None:
        path = self.folder / chunk.file
        if chunk.file not in self._sizes:
            self._sizes[chunk.file] = path.stat().st_size if path.exists() else -1
        size, needed = self._sizes[chunk.file], chunk.offset + chunk.num_bytes
        if size < needed:
            problem = "missing" if size < 0 else f"truncated: {size} bytes found, {needed} needed"
            raise CheckpointError(f"{path}: {problem}, for {chunk.key}; copy or write the checkpoint again")

    def read(self, stored: StoredTensor, shape: Shape) -> Tensor:
        """The parameter that ``check`` accepted; it may be mapped from the file.

        Raises CheckpointError where its bytes are damaged.
        """
        start, wanted = box_of(stored, shape)
        chunks = [chunk for chunk in self._chunks_of(stored) if _overlap(chunk, start, wanted)]
        if len(chunks) == 1:
            return self._load(chunks[0])[_slices(chunks[0].start, start, wanted)].view(shape)
        whole = torch.empty(wanted, dtype=chunks[0].dtype)
        for chunk in chunks:
            corner, size = _overlap(chunk, start, wanted) or (start, wanted)
            part = self._load(chunk)[_slices(chunk.start, corner, size)]
            whole[_slices(start, corner, size)] = part
        return whole.view(shape)

    def _chunks_of(self, stored: StoredTensor) -> list[Chunk]:
        """The chunks that may hold a part of the parameter."""
        num_dims = len(stored.index)
        name = (stored.key, num_dims)
        if name not in self._by_index:
            by_index: defaultdict[Shape, list[Chunk]] = defaultdict(list)
            for chunk in self._chunks[stored.key]:
                by_index[chunk.start[:num_dims]].append(chunk)
            self._by_index[name] = by_index
        return self._by_index[name].get(stored.index, [])

    def _load(self, chunk: Chunk) -> Tensor:
        try:
            tensor = map_saved_tensor(self._descriptor(chunk), chunk.offset, chunk.num_bytes)
        except ArchiveError as error:
            raise self._damaged(chunk, str(error)) from None
        if tuple(tensor.shape) != chunk.shape or tensor.dtype != chunk.dtype:
            raise self._damaged(chunk, f"{tensor.dtype} {list(tensor.shape)} instead of {list(chunk.shape)}")
        return tensor

    def _damaged(self, chunk: Chunk, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / chunk.file}: {chunk.key} at byte {chunk.offset} cannot be read "
            f"({problem}): the file is damaged"
        )

    def _descriptor(self, chunk: Chunk) -> int:
        if chunk.file not in self._descriptors:
            self._descriptors[chunk.file] = os.open(self.folder / chunk.file, os.O_RDONLY)
        return self._descriptors[chunk.file]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def _end(chunk: Chunk) -> Shape:
    return tuple(a + b for a, b in zip(chunk.start, chunk.shape, strict=True))


def _overlap(chunk: Chunk, start: Shape, shape: Shape) -> tuple[Shape, Shape] | None:
    """Start and shape of what a chunk and a box share; None where that is nothing."""
    corner = tuple(map(max, chunk.start, start))
    end = map(min, _end(chunk), (a + b for a, b in zip(start, shape, strict=True)))
    size = tuple(e - c for e, c in zip(end, corner, strict=True))
    return (corner, size) if all(extent > 0 for extent in size) else None


def _slices(origin: Shape, start: Shape, shape: Shape) -> tuple[slice, ...]:
    """The index of a box in a tensor that begins at ``origin``."""
    return tuple(slice(s - o, s - o + size) for o, s, size in zip(origin, start, shape, strict=True))


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()
