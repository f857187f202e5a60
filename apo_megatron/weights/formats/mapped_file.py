"""Bytes of a file as a tensor that is in memory only while it is used."""

from __future__ import annotations

import errno
import mmap
import os

import torch
from torch import Tensor

# Linux 5.14: read all pages now. A failing disk is then an error here, not the end of the process later.
_MADV_POPULATE_READ = 22


def map_tensor(
    descriptor: int, offset: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    """The tensor whose values lie at ``offset`` of an open file, mapped, not copied.

    A mapping of its own, gone with the tensor: pages that are mapped count as memory of the process, and
    one of a whole file would grow with all that was ever read. Fresh memory to read into would cost several
    times as much as the reading. Writing to the tensor does not change the file. Raises OSError where the
    bytes cannot be read, EOFError where the file ends before them.
    """
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    if os.fstat(descriptor).st_size < offset + num_bytes:
        raise EOFError(f"{offset + num_bytes} bytes needed, {os.fstat(descriptor).st_size} found")
    lead = offset % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(descriptor, lead + num_bytes, access=mmap.ACCESS_COPY, offset=offset - lead)
    mapped.madvise(mmap.MADV_WILLNEED)
    try:
        mapped.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel: pages are read when they are touched
            raise
    content = torch.frombuffer(mapped, dtype=torch.uint8, offset=lead, count=num_bytes)
    if content.data_ptr() % dtype.itemsize:  # allowed in a file, not in memory
        content = content.clone()
    return content.view(dtype).view(shape)
