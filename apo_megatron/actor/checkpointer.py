"""Training checkpoints: model, optimizer, schedule, data position and step, in Megatron's format.

Written aside and renamed when complete; ``latest`` moves last, so a run that dies while saving loses
nothing. The random state needs no saving: samples and data order are seeded by step.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.errors import CheckpointError
from apo_megatron.parallel.collectives import barrier
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
    """Saves to and loads from ``folder``/step_XXXXXX. Collective: every rank calls every method."""

    def __init__(self, folder: str | Path, parallel: ParallelContext) -> None:
        self.folder = Path(folder)
        self.parallel = parallel

    def save(self, step: int, actor: MegatronActor, data: DataPosition) -> Path:
        """Write the state after ``step`` completed steps; the folder of the checkpoint."""
        final = self.folder / f"step_{step:06d}"
        partial = self.folder / f".{final.name}.partial"
        if self.parallel.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(self.parallel)
        dist_checkpointing.save(_sharded_state(actor, is_loading=False), str(partial))
        barrier(self.parallel)
        if self.parallel.is_main:
            state = {"step": step, "scheduler": actor.scheduler.state_dict(), "data": data.state_dict()}
            (partial / "state.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            pointer = self.folder / ".latest.partial"
            pointer.write_text(final.name)
            os.replace(pointer, self.folder / "latest")
        barrier(self.parallel)
        return final

    def load_latest(self, actor: MegatronActor, data: DataPosition) -> int:
        """Restore the newest checkpoint and return its number of completed steps; 0 where there is none."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return 0
        folder = self.folder / pointer.read_text().strip()
        try:
            state = json.loads((folder / "state.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{folder / 'state.json'}: {error}. The checkpoint that {pointer} names is not complete: "
                "write the name of an older step_* folder into it, or delete it to start anew"
            ) from error
        loaded = dist_checkpointing.load(_sharded_state(actor, is_loading=True), str(folder))
        for index, chunk in enumerate(actor.model_chunks):
            _inner(chunk).load_state_dict(loaded[f"model{index}"], strict=True)
        actor.optimizer.load_state_dict(loaded["optimizer"])
        _separate_step_counters(actor)
        actor.scheduler.load_state_dict(state["scheduler"])
        data.load_state_dict(state["data"])
        return int(state["step"])


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
    parameters = {name: value for chunk in state.values() for name, value in chunk.items()}
    state["optimizer"] = actor.optimizer.sharded_state_dict(
        parameters, is_loading=is_loading, metadata=dict(_SHARDING)
    )
    return state


def _each_optimizer(actor: MegatronActor) -> list[Any]:
    return list(getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]))


def _initialise_adam_state(actor: MegatronActor) -> None:
    """Make the state that the first update would make, so that a run can be saved and loaded before it.

    Megatron 0.16 creates the moments but no "step", which torch's AdamW has and Megatron asks for.
    """
    for optimizer in _each_optimizer(actor):
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)  # leaves existing state alone
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _keep_adam_steps(actor: MegatronActor) -> None:
    """Let the distributed optimizer find the "step" that Megatron 0.16 drops on the way to the main
    parameters (with Apex or TransformerEngine the step lives in the parameter group)."""
    for optimizer in _each_optimizer(actor):
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


def _separate_step_counters(actor: MegatronActor) -> None:
    """Megatron 0.16 loads one shared step tensor, which torch's AdamW would advance once a parameter."""
    for optimizer in _each_optimizer(actor):
        for state in optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
