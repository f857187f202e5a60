"""Training checkpoints: everything that a run needs to go on exactly as if it had not stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpoint_files import STATE_FILE, CheckpointFolder
from apo_megatron.actor.checkpoint_state import CheckpointState, as_json, check_resumable, fixed_settings
from apo_megatron.actor.random_state import get_random_state, seed_random_state, set_random_state
from apo_megatron.actor.sharded_state import ShardedWrite, load_sharded_state
from apo_megatron.config import RLConfig, SFTConfig, dump_config
from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.parallel.collectives import all_gather_objects, any_rank
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.formats.hf_checkpoint import copy_model_files
from apo_megatron.weights.formats.torch_dist_format import COMMON_FILE, read_chunks

T = TypeVar("T")


class Stateful(Protocol):
    """A part of the run with a state of its own, the same on every rank: plain numbers, texts, containers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    folder: Path
    step: int  # completed steps
    same_layout: bool  # False: the random state was seeded anew


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    partial: Path
    state: CheckpointState
    random_state: dict[str, Any]  # of this rank
    write: ShardedWrite
    keeps_all: bool


class Checkpointer:
    """Saves ``actor`` and ``parts`` (such as {"data": position in the data}) to ``folder``, and loads them.

    Collective: every rank calls every method. ``reference`` is the digest of the reference weights, which
    are read from model.hf_path again when a run goes on. With checkpoint.async_save files are written while
    training goes on; one checkpoint at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        cfg: RLConfig | SFTConfig,
        actor: MegatronActor,
        parts: Mapping[str, Stateful],
        reference: str | None = None,
    ) -> None:
        checkpoint = cfg.checkpoint
        self._files = CheckpointFolder(
            folder, checkpoint.keep_last, checkpoint.keep_best, checkpoint.best_metric
        )
        self._cfg, self._actor, self._parts, self._reference = cfg, actor, dict(parts), reference
        self._parallel = actor.parallel
        self._pending: _Pending | None = None
        self._newest: int | None = None  # completed steps of what was written or loaded last

    def save(self, step: int, metrics: Mapping[str, float], *, keep_all: bool = False) -> Path:
        """Save the state after ``step`` completed steps; ``metrics`` are those of the last one.

        With ``keep_all`` no older checkpoint is removed for it, whatever checkpoint.keep_last says.
        Returns where the checkpoint is, or will be once it is complete. Raises CheckpointError on every rank
        where this checkpoint, or the one before that was still being written, cannot be written on one.
        """
        self.finish()
        if self._newest != step:
            with self._discarded_on_error(step):
                partial = self._on_main(lambda: self._files.begin(step))
            state, random_state = self._state(step, metrics), get_random_state(self._parallel)
            write = ShardedWrite(self._actor, partial)
            self._pending = _Pending(partial, state, random_state, write, keep_all)
            if not self._cfg.checkpoint.async_save:
                self.finish()
        return self._files.path(step)

    def poll(self) -> None:
        """Complete the checkpoint in the background if its files are written. Raises as ``save``."""
        pending = self._pending
        if pending is not None and not any_rank(not pending.write.is_done(), self._parallel):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, if there is one, and complete it. Raises as ``save``."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self._discarded_on_error(pending.state.step):
            results = self._everywhere(lambda: self._write_own_files(pending))
            self._on_main(lambda: pending.write.finish(results))
            self._on_main(
                lambda: self._files.complete(pending.partial, pending.state, keep_all=pending.keeps_all)
            )
        self._newest = pending.state.step

    def load_latest(self, max_step: int) -> Restored | None:
        """Restore the checkpoint that ``latest`` names; None where there is none.

        Raises CheckpointError on every rank where it is damaged, does not belong to this run, was made with
        settings or reference weights that have changed since, or lies beyond ``max_step``.
        """
        # One rank looks: on a shared file system the others may see an older state of the folder.
        found = self._on_main(lambda: self._find(max_step))
        if found is None:
            return None
        folder, state = found
        load_sharded_state(self._actor, folder)
        try:
            self._actor.scheduler.load_state_dict(state.scheduler)
            for name, part in self._parts.items():
                part.load_state_dict(state.parts[name])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / STATE_FILE}: damaged ({type(error).__name__}: {error})"
            ) from error
        self._actor.consecutive_skips = state.consecutive_skips
        same_layout = state.layout == _layout_of(self._parallel.dims)
        if same_layout:
            self._everywhere(lambda: self._restore_random_state(folder))
        else:
            seed_random_state(self._cfg.train.seed + state.step)
        self._newest = state.step
        return Restored(folder, state.step, same_layout)

    def _state(self, step: int, metrics: Mapping[str, float]) -> CheckpointState:
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        return CheckpointState(
            step=step,
            policy_version=step,
            consecutive_skips=self._actor.consecutive_skips,
            scheduler=as_json(self._actor.scheduler.state_dict()),
            parts={name: as_json(part.state_dict()) for name, part in self._parts.items()},
            reference=self._reference,
            metrics=dict(finite),
            settings=as_json(fixed_settings(self._cfg, self._reference)),
            layout=_layout_of(self._parallel.dims),
            files={},
        )

    def _write_own_files(self, pending: _Pending) -> list[Any]:
        """This rank's shards and random state; on the main rank what makes the folder usable on its own.

        Returns what lies where in the shards.
        """
        results = pending.write.wait()
        path = self._random_state_file(pending.partial)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(pending.random_state), encoding="utf-8")
        if self._parallel.is_main:
            dump_config(self._cfg, pending.partial / "config.yaml")
            (pending.partial / "hf").mkdir()
            copy_model_files(resolve_model_path(self._cfg.model.hf_path), pending.partial / "hf")
        return results

    def _find(self, max_step: int) -> tuple[Path, CheckpointState] | None:
        folder = self._files.latest()
        if folder is None:
            return None
        state = self._files.read(folder)
        settings = fixed_settings(self._cfg, self._reference)
        check_resumable(state, folder, settings, set(self._parts), self._reference, max_step)
        read_chunks(folder, tensors_only=True)  # Megatron and torch unpickle whatever else is there
        try:  # as Megatron does, unless torch is told to unpickle anything
            torch.load(folder / COMMON_FILE, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(
                f"{folder / COMMON_FILE}: damaged, or holds more than tensors and plain values "
                f"({type(error).__name__}): resume an older checkpoint"
            ) from error
        return folder, state

    def _restore_random_state(self, folder: Path) -> None:
        path = self._random_state_file(folder)
        try:
            set_random_state(json.loads(path.read_text(encoding="utf-8")), self._parallel)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error

    def _random_state_file(self, folder: Path) -> Path:
        return folder / "random_state" / f"rank_{self._parallel.rank:05d}.json"

    @contextmanager
    def _discarded_on_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:  # on every rank
            self._on_main(self._files.discard_unfinished)
            raise CheckpointError(
                f"{self._files.path(step)} could not be written: {error}. The checkpoints before it are as "
                "they were: make room or mend the folder, then go on from the latest with --resume auto"
            ) from error

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """Call ``action`` on every rank; the results by rank. Where one fails, all raise CheckpointError."""
        result: T | None = None
        problem = None
        try:
            result = action()
        except (OSError, CheckpointError) as error:
            problem = str(error)
        outcomes = all_gather_objects((result, problem), self._parallel)
        for rank, (_, found) in enumerate(outcomes):
            if found is not None:
                raise CheckpointError(found if rank == 0 else f"rank {rank}: {found}")
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def _on_main(self, action: Callable[[], T]) -> T:
        """Call ``action`` on the main rank; its result on every rank, or CheckpointError."""
        return self._everywhere(lambda: action() if self._parallel.is_main else None)[0]  # type: ignore[return-value]


def _layout_of(dims: ParallelDims) -> dict[str, Any]:
    """What the random state of a rank depends on, as JSON can hold it."""
    axes = asdict(dims)
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        del axes[name]
    return axes
