"""Training checkpoints: model, optimizer, schedule, data position and step, in Megatron's format.

Written aside and renamed when complete; ``latest`` moves last, so a run that dies while saving loses
nothing. The random state needs no saving: samples and data order are seeded by step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.errors import CheckpointError
from apo_megatron.files import write_atomically
from apo_megatron.parallel.collectives import barrier, broadcast_from_main
from apo_megatron.parallel.state import ParallelContext

# fully_reshardable: the optimizer state may be loaded at another TP / PP / DP.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


class DataPosition(Protocol):
    """What remembers how far the data was read."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves to and loads from ``folder``/step_XXXXXX. Collective: every rank calls every method.

    ``settings`` ({dotted name: value}) is what a resumed run must share with the one that saved.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], parallel: ParallelContext) -> None:
        self.folder = Path(folder)
        self._settings = dict(settings)
        self._parallel = parallel

    def save(self, step: int, actor: MegatronActor, data: DataPosition) -> Path:
        """Write the state after ``step`` completed steps; the folder of the checkpoint."""
        final = self.folder / f"step_{step:06d}"
        partial, replaced = self.folder / f".{final.name}.partial", self.folder / f".{final.name}.replaced"
        if self._parallel.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(self._parallel)
        dist_checkpointing.save(_sharded_state(actor, is_loading=False), str(partial))
        barrier(self._parallel)
        if self._parallel.is_main:
            state = {
                "step": step,
                "scheduler": actor.scheduler.state_dict(),
                "data": data.state_dict(),
                "settings": self._settings,
            }
            write_atomically(partial / "state.json", json.dumps(state, indent=1))
            if final.exists():  # ``latest`` may name it: it must not be gone at any time for longer than this
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            write_atomically(self.folder / "latest", final.name)
        barrier(self._parallel)
        return final

    def load_latest(self, actor: MegatronActor, data: DataPosition, max_step: int) -> int:
        """Restore the newest checkpoint and return its number of completed steps; 0 where there is none.

        Raises CheckpointError where it is not complete, was made with other settings, holds another model
        or lies beyond ``max_step``.
        """
        pointer = self.folder / "latest"
        # One rank looks: on a shared file system the others may see an older state of the folder.
        name = broadcast_from_main(pointer.read_text().strip() if pointer.exists() else "", self._parallel)
        if not name:
            return 0
        folder = self.folder / name
        state = self._read_state(folder)
        if state["step"] > max_step:
            raise CheckpointError(
                f"{folder} has {state['step']} completed steps, train.num_steps={max_step}: raise num_steps "
                "or choose another train.run_dir"
            )
        try:
            loaded = dist_checkpointing.load(_sharded_state(actor, is_loading=True), str(folder))
        except CheckpointingException as error:
            raise CheckpointError(f"{folder} does not fit the model: {error}") from error
        for index, chunk in enumerate(actor.model_chunks):
            _inner(chunk).load_state_dict(loaded[f"model{index}"], strict=True)
        _add_missing_step(actor, loaded["optimizer"])
        actor.optimizer.load_state_dict(loaded["optimizer"])
        _separate_adam_steps(actor)
        actor.scheduler.load_state_dict(state["scheduler"])
        data.load_state_dict(state["data"])
        return int(state["step"])

    def _read_state(self, folder: Path) -> dict[str, Any]:
        path = folder / "state.json"
        try:
            state = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{path}: {error}. The checkpoint that {self.folder / 'latest'} names is not complete: write "
                "the name of an older step_* folder into that file, or delete it to start anew"
            ) from error
        saved, current = state["settings"], json.loads(json.dumps(self._settings))
        differing = [
            f"{name}: {saved.get(name)!r} there, {current.get(name)!r} here"
            for name in sorted(saved.keys() | current.keys())
            if saved.get(name) != current.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"{folder} was made with other settings ({'; '.join(differing)}): take these back, or start "
                "anew in another train.run_dir"
            )
        return dict(state)


def _inner(chunk: DistributedDataParallel) -> MegatronModule:
    """The model that DDP wraps: its state has the plain names."""
    return chunk.module


def _sharded_state(actor: MegatronActor, *, is_loading: bool) -> dict[str, Any]:
    _initialise_adam_state(actor)
    if is_loading:
        _keep_adam_steps(actor)
    state: dict[str, Any] = {
        f"model{index}": _inner(chunk).sharded_state_dict(metadata=dict(_SHARDING))
        for index, chunk in enumerate(actor.model_chunks)
    }
    # The optimizer looks through all chunks; merged they would overwrite each other's local layer names.
    state["optimizer"] = actor.optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=dict(_SHARDING)
    )
    return state


def _torch_adam_optimizers(actor: MegatronActor) -> list[Any]:
    """Megatron's optimizers that run torch's Adam. Those of Apex and TransformerEngine count steps in the
    parameter group, which Megatron 0.16 handles; torch's count them per parameter, which it does not."""
    optimizers = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    return [o for o in optimizers if isinstance(o.optimizer, torch.optim.Adam)]


def _initialise_adam_state(actor: MegatronActor) -> None:
    """Make the state that the first update would make, so that a run can be saved and loaded before it.

    Megatron creates the moments but no "step", which it then asks for.
    """
    for optimizer in _torch_adam_optimizers(actor):
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # leaves existing state alone
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _keep_adam_steps(actor: MegatronActor) -> None:
    """Let the distributed optimizer find the "step" that Megatron drops on the way to the main parameters."""
    for optimizer in _torch_adam_optimizers(actor):
        if not isinstance(optimizer, DistributedOptimizer):
            continue
        original = optimizer._set_main_param_and_optimizer_states

        def keep_step(
            parameter: Any, tensors: Any, optimizer: Any = optimizer, original: Any = original
        ) -> Any:
            group, order = optimizer.model_param_group_index_map[parameter]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            tensors.setdefault("step", optimizer.optimizer.state[main]["step"])
            return original(parameter, tensors)

        optimizer._set_main_param_and_optimizer_states = keep_step


def _add_missing_step(actor: MegatronActor, loaded: dict[str, Any]) -> None:
    """Put back the step 0 that Megatron leaves out where the optimizer is not distributed."""
    for optimizer in _torch_adam_optimizers(actor):
        if not isinstance(optimizer, DistributedOptimizer):
            adam_state = loaded.get("optimizer", loaded)["state"]
            adam_state.setdefault("common_step", torch.tensor(0.0))


def _separate_adam_steps(actor: MegatronActor) -> None:
    """Give each parameter a step of its own: Megatron loads one shared tensor, which torch's Adam would
    advance once a parameter."""
    for optimizer in _torch_adam_optimizers(actor):
        for state in optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
