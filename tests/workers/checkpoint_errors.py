"""Saves that cannot be finished and checkpoints that were damaged: what is said, and what is left."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from apo_megatron import sft
from apo_megatron.actor import checkpoint_files, sharded_state
from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.parallel.collectives import barrier
from tests.workers.checkpoints import Counter, actor_of, config, refusal, update

NOBODY = 65534


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def failures(payload: dict[str, Any]) -> dict[str, Any]:
    """Messages of this rank by case; after each case the checkpoint before it is loaded."""
    found: dict[str, Any] = {}
    for is_async in (False, True):
        cfg = config(payload, {"tensor_parallel_size": 2}, async_save=is_async)
        actor, root = actor_of(cfg), Path(payload["folder"], str(is_async))
        parts = {"data": Counter(7)}
        checkpointer = Checkpointer(root, cfg, actor, parts)
        checkpointer.save(1, {})
        checkpointer.finish()
        update(payload, actor, 0)

        def save(checkpointer: Checkpointer = checkpointer) -> None:
            checkpointer.save(2, {})
            checkpointer.finish()

        for name, obstacle in _obstacles(actor.parallel.rank).items():
            with obstacle:
                message = refusal(save)
            barrier(actor.parallel)
            found[f"{name} {is_async}"] = (message, sorted(p.name for p in root.iterdir()))
            assert refusal(lambda c=checkpointer: c.load_latest(5)) == ""
        save()
        assert (root / "latest").read_text() == "step_000002"
    return found | _damages(actor, root, lambda: Checkpointer(root, cfg, actor, parts).load_latest(5))


def sft_main(payload: dict[str, Any]) -> int:
    """The command line of the cold start."""
    return sft.main(payload["argv"])


def _obstacles(rank: int) -> dict[str, Any]:
    return {
        "disk full before": _largest_file(1000, is_here=rank == 0),
        "disk full within": _largest_file(30_000, is_here=rank == 1),
        "metadata": _failing(FileSystemWriter, "finish", is_here=rank == 0),
        "config": _failing(sharded_state, "save_config", is_here=rank == 0),
        "common state": _failing(TorchCommonSaveStrategy, "save_common", is_here=rank == 0),
        "no permission": _unprivileged(is_here=rank == 0),
    }


@contextmanager
def _largest_file(num_bytes: int, is_here: bool) -> Iterator[None]:
    """Files cannot grow beyond ``num_bytes`` on this rank."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _failing(owner: Any, name: str, is_here: bool) -> Iterator[None]:
    """The function finds the disk full on this rank."""

    def fail(*values: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    with patch.object(owner, name, fail) if is_here else nullcontext():
        yield


@contextmanager
def _unprivileged(is_here: bool) -> Iterator[None]:
    """Files of root cannot be written on this rank."""
    if is_here:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(os.getuid())


def _damages(actor: MegatronActor, root: Path, load: Callable[[], Any]) -> dict[str, Any]:
    """Messages about a checkpoint whose files have the right sizes, but not what belongs into them."""
    folder, good, mark = root / "step_000002", root / "good", root / "unpickled"
    damages: dict[str, Callable[[], Any]] = {
        "shard": lambda: _overwrite_start(folder / "__1_0.distcp"),
        "common": lambda: torch.save({"optimizer": Evil(mark)}, folder / "common.pt"),
        "metadata": lambda: (folder / ".metadata").write_bytes(pickle.dumps(Evil(mark))),
        "no tensor": lambda: _make_loaded_as_object(folder, mark),
        "schedule": lambda: _edit_state(folder, scheduler={}),
        "random state": lambda: (folder / "random_state" / "rank_00001.json").write_text("{}"),
    }
    if actor.parallel.is_main:
        shutil.copytree(folder, good)
    found = {}
    for name, damage in damages.items():
        if actor.parallel.is_main:
            damage()
            _make_sizes_right(folder)
        barrier(actor.parallel)
        found[name] = refusal(load)
        barrier(actor.parallel)
        if actor.parallel.is_main:
            shutil.rmtree(folder)
            shutil.copytree(good, folder)
        barrier(actor.parallel)
        assert refusal(load) == "" and not mark.exists()
    return found


def _overwrite_start(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


def _make_loaded_as_object(folder: Path, mark: Path) -> None:
    """A .metadata of nothing but the format, by which torch would unpickle a file."""
    torch.save(Evil(mark), folder / "object.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = "embedding.word_embeddings.weight"
    entry = BytesStorageMetadata()
    entry.__dict__["size"] = metadata.state_dict_metadata[key].size
    metadata.state_dict_metadata[key] = entry
    places = {place: file for place, file in metadata.storage_data.items() if place.fqn != key}
    size = (folder / "object.distcp").stat().st_size
    metadata.storage_data = places | {MetadataIndex(key): _StorageInfo("object.distcp", 0, size)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _make_sizes_right(folder: Path) -> None:
    files = json.loads((folder / checkpoint_files.STATE_FILE).read_text())["files"]
    _edit_state(folder, files={name: (folder / name).stat().st_size for name in files})


def _edit_state(folder: Path, **values: Any) -> None:
    path = folder / checkpoint_files.STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
