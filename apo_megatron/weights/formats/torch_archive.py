"""What torch.save makes of a tensor, written and read without copies of the tensor.

An archive is a zip with a pickle in it that names storages by their number; their bytes lie uncompressed in
records of their own. torch.load copies them, unless the archive is a file of its own; in a distributed
checkpoint a file is many archives, one after the other. The pickle is read here by an unpickler that knows
nothing but tensors.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from apo_megatron.weights.formats.mapped_file import map_tensor
from apo_megatron.weights.layouts import Shape

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
# What unpickling damaged bytes, and looking through what came of it, can end in.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
)
_LOCAL_HEADER_BYTES = 30  # then a name and an extra field, whose lengths are its last two numbers


class ArchiveError(ValueError):
    """Bytes that are not a tensor saved by torch.save."""


@functools.cache
def saved_around(shape: Shape, dtype: torch.dtype) -> tuple[bytes, int, bytes]:
    """What torch.save writes before and after the values of a contiguous tensor; between: their bytes.

    Without checksums, which torch.load never looks at and which take as long as the writing.
    """
    recorder = _Recorder()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data():
            torch.save(torch.empty(shape, dtype=dtype), cast(BinaryIO, recorder))
    finally:
        torch.serialization.set_crc32_options(checksums)
    return bytes(recorder.before), recorder.skipped_bytes, bytes(recorder.after)


class _Recorder(io.RawIOBase):
    """Takes what is written, up to where the values of the only tensor are skipped, and after that."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = bytearray(), bytearray()
        self.skipped_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        (self.after if self.skipped_bytes else self.before).extend(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        assert whence == os.SEEK_CUR and not self.skipped_bytes
        self.skipped_bytes = offset
        return len(self.before) + offset


def map_saved_tensor(descriptor: int, offset: int, num_bytes: int) -> Tensor:
    """The tensor saved in these bytes of an open file. Raises ArchiveError or OSError."""
    try:
        archive = _Archive(descriptor, offset, num_bytes)
        (name,) = (name for name in archive.names if name.endswith("/data.pkl"))
        content = os.pread(descriptor, *reversed(archive.locate(name)))
        tensor = _TensorUnpickler(content, archive, name.removesuffix(".pkl")).load()
    except (zipfile.BadZipFile, *UNPICKLING_ERRORS) as error:
        raise ArchiveError(f"{type(error).__name__}: {error}") from None
    if not isinstance(tensor, Tensor):
        raise ArchiveError(f"a tensor expected, found {type(tensor).__name__}")
    return tensor


class _Archive:
    """Where the records of a zip lie. Their checksums are not looked at: they may have been left out."""

    def __init__(self, descriptor: int, offset: int, num_bytes: int) -> None:
        self.descriptor, self._offset, self._num_bytes = descriptor, offset, num_bytes
        with zipfile.ZipFile(_FilePart(descriptor, offset, num_bytes)) as archive:
            self._records = {info.filename: info for info in archive.infolist()}

    @property
    def names(self) -> list[str]:
        return list(self._records)

    def locate(self, name: str) -> tuple[int, int]:
        """(offset in the file, bytes) of a record."""
        record = self._records[name]
        if record.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{name} is compressed")
        begin = record.header_offset
        if not 0 <= begin <= self._num_bytes - _LOCAL_HEADER_BYTES:
            raise zipfile.BadZipFile(f"{name} begins at {begin}")
        header = os.pread(self.descriptor, _LOCAL_HEADER_BYTES, self._offset + begin)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        begin += _LOCAL_HEADER_BYTES + lengths
        if begin + record.file_size > self._num_bytes:
            raise zipfile.BadZipFile(f"{name} ends after the archive")
        return self._offset + begin, record.file_size


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, archive: _Archive, folder: str) -> None:
        super().__init__(io.BytesIO(content))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]  # the class says no more than that
        raise pickle.UnpicklingError(f"names {module}.{name}, which is no part of a tensor")

    def persistent_load(self, identity: Any) -> Tensor:
        """A storage, as a flat tensor."""
        _, dtype, key, _, numel = identity
        start, num_bytes = self._archive.locate(f"{self._folder}/{key}")
        if num_bytes < numel * dtype.itemsize:
            raise pickle.UnpicklingError(f"record {key} has {num_bytes} bytes, for {numel} elements")
        return map_tensor(self._archive.descriptor, start, numel * dtype.itemsize, dtype, (numel,))


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
) -> Tensor:
    return storage.as_strided(size, stride, offset)


class _FilePart(io.RawIOBase):
    """Some bytes of an open file as a file."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._num_bytes = descriptor, start, num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise OSError("before the start")  # zipfile expects OSError
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        room = memoryview(buffer).cast("B")[: max(0, self._num_bytes - self._position)]
        count = os.preadv(self._descriptor, [room], self._start + self._position) if room else 0
        self._position += count
        return count
