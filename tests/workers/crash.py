"""Goes on from the latest checkpoint, sees that it is whole, and dies at a moment of saving the next one."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import xxhash
from megatron.core.dist_checkpointing.strategies import filesystem_async

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.parallel.collectives import all_gather_objects
from tests.workers.checkpoints import actor_of, config, update

_FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}


class Moments:
    """Counts what this process does to files below ``folder``; dies just before number ``deadly``."""

    def __init__(self, folder: Path, deadly: int | None) -> None:
        self.count = 0
        self.is_armed = False
        self._folder, self._deadly = str(folder), deadly
        sys.addaudithook(self._on_event)
        write_item = filesystem_async._write_item

        @functools.wraps(write_item)  # Megatron looks at its signature
        def counted(*values: Any, **options: Any) -> Any:  # between the tensors of a file
            self._pass()
            return write_item(*values, **options)

        filesystem_async._write_item = counted

    def _on_event(self, event: str, values: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and str(values[0]).startswith(self._folder):
            self._pass()

    def _pass(self) -> None:
        if self.is_armed:
            self.count += 1
            if self.count == self._deadly:
                os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(payload: dict[str, Any]) -> dict[str, Any]:
    """One life: {"restored": (step, life that saved it)} and, of a life without a death, its moments.

    Every life takes other updates, and writes down the digest of each rank's state before it saves it.
    """
    layout = {"tensor_parallel_size": 2}
    cfg = config(payload, layout, keep_last=1, async_save=payload["async_save"])
    actor = actor_of(cfg)
    checkpointer = Checkpointer(payload["folder"], cfg, actor, {})
    digests, rank = Path(payload["digests"]), actor.parallel.rank
    restored = checkpointer.load_latest(max_step=10**6)
    step = 0 if restored is None else restored.step
    if restored is not None:
        digest = _digest(actor)
        mine = {p.name for p in digests.glob(f"{step}_*_{rank}") if p.read_text() == digest}
        lives = [{name.split("_")[1] for name in names} for names in all_gather_objects(mine, actor.parallel)]
        assert len(set.intersection(*lives)) == 1, f"step {step} was saved by nobody as it is: {lives}"
        life = set.intersection(*lives).pop()
        print(f"restored {step} {life}", flush=True)

    other_tokens = [(tokens + payload["life"]) % 100 + 2 for tokens in payload["sequences"]]
    update(payload | {"sequences": other_tokens}, actor, step)
    (digests / f"{step + 1}_{payload['life']}_{rank}").write_text(_digest(actor))
    moments = Moments(Path(payload["folder"]), payload["deadly"] if rank == payload["dying_rank"] else None)
    moments.is_armed = True
    checkpointer.save(step + 1, {})
    update(payload, actor, 0)
    checkpointer.finish()
    moments.is_armed = False
    if payload["deadly"] is not None and rank == payload["dying_rank"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"moments": moments.count}


def _digest(actor: MegatronActor) -> str:
    """Of this rank's parameters and optimizer state."""
    digest = xxhash.xxh3_128()
    for chunk in actor.model_chunks:
        for parameter in chunk.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        for state in part.optimizer.state.values():
            for name in sorted(state):
                digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
