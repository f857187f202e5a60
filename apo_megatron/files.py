"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
from pathlib import Path


def make_durable(path: str | Path) -> None:
    """Have the contents of a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` beside ``path``, then rename: there is the old content or the new, nothing between."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # the new name must not outlive, in a power failure, what it names
    os.replace(aside, path)
