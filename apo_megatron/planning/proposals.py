"""Layouts in which the run fits, in the order of a simple rule.

Least recomputation; then the fewest ranks that share a copy of the model, tensor parallel ones within a node;
then the fewest pipeline stages, which wait for each other; then the smallest context and expert parallel
sizes. Sequence parallelism goes with tensor parallelism, since it only saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from pydantic import ValidationError

from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.config.schema import RLConfig
from apo_megatron.errors import ConfigError
from apo_megatron.planning.activations import Recompute
from apo_megatron.planning.plan import Plan, Setting, make_plan
from apo_megatron.weights.architecture import Architecture

RANKS_PER_NODE = 8
MODES: tuple[Recompute, ...] = ("none", "full")
_CONTEXT_SIZES = (1, 2, 4, 8)
_MOST_DOUBLINGS = 12


def propose(cfg: RLConfig, setting: Setting, per_mode: int = 3) -> list[Plan]:
    """At most ``per_mode`` plans that fit for each recompute mode, best first.

    Where nothing fits on ``setting.world`` ranks, for the smallest of its doubles on which something does;
    [] where that would be more than 4096 times as many.
    """
    for doublings in range(_MOST_DOUBLINGS + 1):
        larger = replace(setting, world=setting.world * 2**doublings)
        found = [plan for mode in MODES for plan in _first_that_fit(cfg, larger, mode, per_mode)]
        if found:
            return found
    return []


def overrides(cfg: RLConfig, proposed: RLConfig) -> list[str]:
    """``section.field=value`` for what differs in layout and recomputation."""
    changes = []
    for field in ParallelConfig.model_fields:
        value = getattr(proposed.parallel, field)
        if value != getattr(cfg.parallel, field):
            changes.append(f"parallel.{field}={_as_yaml(value)}")
    if proposed.model.recompute != cfg.model.recompute:
        changes.append(f"model.recompute={proposed.model.recompute}")
    return changes


def _as_yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _first_that_fit(cfg: RLConfig, setting: Setting, mode: Recompute, number: int) -> list[Plan]:
    found: list[Plan] = []
    model = cfg.model.model_copy(update={"recompute": mode})
    for parallel in _layouts(cfg.parallel, setting):
        candidate = cfg.model_copy(update={"parallel": parallel, "model": model})
        try:
            plan = make_plan(candidate, setting)
        except ConfigError:  # the mesh does not divide the model, or the ranks
            continue
        has_work = plan.workload.num_sequences >= plan.dims.data * plan.workload.num_mini_batches
        if plan.fits and has_work:
            found.append(plan)
            if len(found) == number:
                break
    return found


def _layouts(parallel: ParallelConfig, setting: Setting) -> Iterator[ParallelConfig]:
    """In the order of the rule; without those that the configuration's rules refuse."""
    sizes = [
        (tensor * pipeline * context, pipeline, context, expert, tensor)
        for tensor, pipeline, context, expert in product(
            _divisors(RANKS_PER_NODE),
            _divisors(setting.architecture.num_layers),
            _CONTEXT_SIZES,
            _expert_sizes(setting.architecture),
        )
        if setting.world % (tensor * pipeline * context) == 0 and setting.world % (expert * pipeline) == 0
    ]
    for _, pipeline, context, expert, tensor in sorted(sizes):
        try:
            yield ParallelConfig(
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
                context_parallel_size=context,
                expert_parallel_size=expert,
                sequence_parallel=tensor > 1,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                timeout_minutes=parallel.timeout_minutes,
                stall_minutes=parallel.stall_minutes,
            )
        except ValidationError:
            continue


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _expert_sizes(architecture: Architecture) -> list[int]:
    return [1] if architecture.experts is None else _divisors(architecture.experts.num_experts)
