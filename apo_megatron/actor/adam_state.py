"""What Megatron 0.16 loses of AdamW's step counters when it saves and loads, put right.

torch's AdamW counts steps per parameter, which Megatron does not handle; those of Apex and TransformerEngine
count them in the parameter group. Experts have an optimizer part of their own, without parameters on a
pipeline stage that has no experts: there nothing counts, and what is saved of that is what all ranks load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_NO_PARAMETER = "no parameter"  # stands for one in the state of a part that has none


def initialise_adam_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that the first update would make, so that a run can be saved and loaded before it.

    Megatron creates the moments but no "step", which it then asks for: where the optimizer is distributed,
    also in a part that has no parameters.
    """
    for part in _torch_adam_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)  # leaves existing state alone
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part.optimizer.state[_NO_PARAMETER]["step"] = torch.tensor(0.0)


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """``optimizer.load_state_dict(loaded)`` that brings all step counters back, too.

    The ends of the learning-rate schedule, which Megatron keeps in the parameter groups, stay as they are.
    """
    rates = [{name: group[name] for name in ("max_lr", "min_lr")} for group in optimizer.param_groups]
    every_part = _parts(optimizer)
    states = [loaded] if len(every_part) == 1 else [loaded[number] for number in range(len(every_part))]
    for state in states:
        state.setdefault("fp32_from_fp16_params", [])  # is not saved of a part without parameters
    _share_steps(every_part, [state.get("optimizer", state) for state in states])
    parts = _torch_adam_optimizers(optimizer)
    with _steps_kept(parts):
        optimizer.load_state_dict(loaded)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group.update(rate)
    for part in parts:
        # Megatron sets one shared tensor, which torch's Adam would advance once a parameter.
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _share_steps(parts: list[Any], states: list[dict[str, Any]]) -> None:
    """Give every part the step of those that have counted. All step together, so that is the largest."""
    groups = [group for state in states for group in state["param_groups"]]
    step = max((group["step"] for group in groups if "step" in group), default=None)
    if step is not None:
        for group in groups:
            group["step"] = step
    # A torch optimizer that is not distributed; Megatron leaves a step of 0 out.
    common = [state["state"]["common_step"] for state in states if "common_step" in state.get("state", {})]
    for part, state in zip(parts, states, strict=True):
        if isinstance(part.optimizer, torch.optim.Adam) and not isinstance(part, DistributedOptimizer):
            state["state"]["common_step"] = max(common, default=torch.tensor(0.0)).clone()


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
