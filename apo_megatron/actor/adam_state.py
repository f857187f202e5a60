"""What Megatron 0.16 loses of torch's AdamW when it saves and loads, put right.

The optimizers of Apex and TransformerEngine count steps in the parameter group, which Megatron handles;
torch's counts them per parameter, which it does not. Nothing here touches the former.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def initialise_adam_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that the first update would make, so that a run can be saved and loaded before it.

    Megatron creates the moments but no "step", which it then asks for.
    """
    for part in _torch_adam_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # leaves existing state alone
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict(loaded)`` that brings torch's step counters back, too."""
    every_part = _parts(optimizer)
    states = [loaded] if len(every_part) == 1 else [loaded[number] for number in range(len(every_part))]
    for part, state in zip(every_part, states, strict=True):
        # Where the optimizer is not distributed Megatron leaves a step of 0 out.
        if isinstance(part.optimizer, torch.optim.Adam) and not isinstance(part, DistributedOptimizer):
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(0.0))
    parts = _torch_adam_optimizers(optimizer)
    with _steps_kept(parts):
        optimizer.load_state_dict(loaded)
    for part in parts:
        # Megatron sets one shared tensor, which torch's Adam would advance once a parameter.
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Experts have an optimizer of their own; Megatron numbers the states of several."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adam_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    return [part for part in _parts(optimizer) if isinstance(part.optimizer, torch.optim.Adam)]


@contextmanager
def _steps_kept(parts: list[Any]) -> Iterator[None]:
    """Let the distributed optimizer find the "step" that Megatron drops on the way to the main parameters."""
    distributed = [part for part in parts if isinstance(part, DistributedOptimizer)]
    for part in distributed:
        part._set_main_param_and_optimizer_states = _keeping_step(part)
    try:
        yield
    finally:
        for part in distributed:
            del part._set_main_param_and_optimizer_states  # the method of the class shows again


def _keeping_step(part: Any) -> Any:
    original = part._set_main_param_and_optimizer_states

    def set_states(parameter: Any, tensors: Any) -> Any:
        group, order = part.model_param_group_index_map[parameter]
        main = part.optimizer.param_groups[group]["params"][order]
        tensors.setdefault("step", part.optimizer.state[main]["step"])
        return original(parameter, tensors)

    return set_states
