"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def make_durable(path: str | Path) -> None:
    """Have the contents of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: str | Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write into, which takes its name at the end, or is gone after an error.

    ``durable``: before that, wait until the disk has it.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            if durable:  # the new name must not outlive, in a power failure, what it names
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str, durable: bool = True) -> None:
    """Write ``text`` beside ``path``, then rename: there is the old content or the new, nothing between."""
    with written_aside(path, durable) as file:
        file.write(text.encode("utf-8"))
