"""Directories that appear under their final name complete, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from apo_megatron.errors import CheckpointError
from apo_megatron.files import make_durable
from apo_megatron.parallel.collectives import barrier
from apo_megatron.parallel.world import World

# A directory with all the files of one of these is a checkpoint, which may be replaced by another.
_MARKS = (("config.json", "*.safetensors"), ("metadata.json", ".metadata"))
_FOLDERS = {"hf", "random_state"}  # of a Megatron checkpoint


def check_output(folder: Path, num_bytes: int, overwrite: bool, inputs: Sequence[Path]) -> None:
    """See before anything is written that ``num_bytes`` can be written to ``folder``.

    Raises CheckpointError where ``folder`` exists (unless ``overwrite``, and it is a checkpoint), where it
    holds one of ``inputs``, where its parent cannot be written, and where the disk has too little space.
    """
    target = folder.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise CheckpointError(f"{folder}: writing there would destroy the input {path}: choose another")
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder}: exists already; choose another directory, or give --overwrite")
    if folder.exists() and not _may_be_replaced(folder):
        raise CheckpointError(
            f"{folder}: not a checkpoint and nothing else (files expected: "
            f"{' or '.join(' and '.join(names) for names in _MARKS)}), so --overwrite does not remove it; "
            "remove it yourself or choose another directory"
        )
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        raise CheckpointError(f"{parent}: cannot be written, so {folder} cannot be made there")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder}: {num_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on the disk: free some, or "
            "choose another directory (what is replaced is removed last)"
        )


@contextmanager
def written_aside(folder: Path, world: World) -> Iterator[Path]:
    """A new directory beside ``folder`` that takes its place when all ranks have left the block. Collective.

    What ``folder`` held is removed after that. After an error the new directory is removed and ``folder``
    is as before; a process that is killed leaves ``.<name>.partial``, which the next one removes, or
    ``.<name>.replaced``, which the next one puts back.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    if world.is_main:
        replaced = _replaced(folder)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    barrier(world)
    complete = False
    try:
        yield partial
        barrier(world)
        if world.is_main:
            _put_in_place(partial, folder)
        complete = True
    finally:
        if not complete and world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    barrier(world)


def _put_in_place(partial: Path, folder: Path) -> None:
    for path in (partial, *(p for p in partial.rglob("*") if not p.is_symlink())):
        make_durable(path)
    replaced = _replaced(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    make_durable(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _may_be_replaced(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    content = list(folder.iterdir())
    if any(path.is_dir() and path.name not in _FOLDERS for path in content):
        return False
    return not content or any(all(any(folder.glob(name)) for name in names) for names in _MARKS)
