"""A new file that the disk has when writing it is over, without a long wait at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

# After so many bytes the disk is told to begin with them, in the background.
FLUSH_BYTES = 128 * 2**20
# In one system call. For larger ones the page cache takes larger pages, which a virtual machine may have to
# fetch from its host: up to three times as slow.
WRITE_BYTES = 512 * 2**10


class DurableFile:
    """Writes at given places of a new file. Use as a context manager.

    Leaving the block without an error waits until the disk has everything. Raises OSError, with the file's
    name, where the disk is full or cannot be written, FileExistsError where the file is there already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._unflushed_bytes = 0
        self._flusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._flush: Future[None] | None = None

    def write(self, parts: Sequence[bytes | memoryview], offset: int) -> int:
        """Write the parts one after the other, the first at ``offset``; the offset after the last."""
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    count = os.pwrite(self._descriptor, rest[:WRITE_BYTES], offset)
                    rest, offset = rest[count:], offset + count
                    self._unflushed_bytes += count
        except OSError as error:
            error.filename = str(self.path)
            raise
        if self._unflushed_bytes >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed_bytes = 0
            self._flush = self._flusher.submit(os.fdatasync, self._descriptor)
        return offset

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._flusher.shutdown()
        try:
            if kind is None:
                if self._flush is not None:
                    self._flush.result()  # raises what went wrong there
                os.fsync(self._descriptor)
        except OSError as failure:
            failure.filename = str(self.path)
            raise
        finally:
            os.close(self._descriptor)
