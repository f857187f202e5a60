"""A plan as tables for people, and as plain data for programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from apo_megatron.planning.advice import gib, warnings_of
from apo_megatron.planning.memory import StageMemory
from apo_megatron.planning.parameters import num_parameters
from apo_megatron.planning.plan import MARGIN, Plan
from apo_megatron.planning.proposals import overrides

_GIB = 2**30


def print_plan(console: Console, plan: Plan) -> None:
    """What was planned, memory of the telling stages, operations, warnings, the verdict."""
    print_line = _line_printer(console)
    dims, workload = plan.dims, plan.workload
    print_line(
        f"{plan.setting.architecture.model_type}, {num_parameters(plan.setting.architecture) / 1e9:.2f} B "
        f"parameters in {plan.cfg.model.dtype}, recompute {plan.cfg.model.recompute}; {dims.world} ranks of "
        f"{gib(plan.setting.device_bytes)}: {layout_of(plan)}"
    )
    print_line(
        f"a step: {workload.num_sequences:,} sequences of up to {workload.sequence_length:,} tokens "
        f"({workload.response_length:,} trained); micro-batches of {workload.tokens_per_micro_batch:,} "
        f"tokens, {workload.num_micro_batches(dims):,} a rank and update"
    )
    console.print(_memory_table(plan))
    print_line(
        f"host memory of a rank, pinned: {gib(plan.rollout.reference)} reference weights, "
        f"{gib(plan.rollout.moved_out)} optimizer state at times"
    )
    flops = plan.flops
    statistics = f", statistics of mini-batches {_peta(flops.statistics)}" if flops.statistics else ""
    print_line(
        f"PFLOP of a step at these lengths: training {_peta(flops.training)}, recomputation "
        f"{_peta(flops.recompute)}, old log-probs {_peta(flops.old_log_probs)}, reference "
        f"{_peta(flops.reference)}{statistics}; a rank {_peta(flops.trainer / dims.world)}; rollout apart "
        f"{_peta(flops.rollout)}"
    )
    for warning in warnings_of(plan):
        print_line(f"warning: {warning}")
    verdict = "fits" if plan.fits else "does not fit"
    print_line(
        f"{verdict}: {gib(plan.peak)} of {gib(plan.usable_bytes)} ({MARGIN:.0%} of the device are left for "
        "its context, communication and fragments)"
    )


def print_proposals(console: Console, plan: Plan, proposals: Sequence[Plan]) -> None:
    print_line = _line_printer(console)
    if not proposals:
        print_line("no layout fits: shorten the sequences or micro-batches, or use devices with more memory")
        return
    world = proposals[0].setting.world
    more = "" if world == plan.setting.world else f", of which there must be more than {plan.setting.world}"
    print_line(
        f"layouts that fit on {world} ranks{more} (least recomputation, then fewest ranks a copy of the "
        "model, then fewest stages):"
    )
    for proposal in proposals:
        changes = overrides(plan.cfg, proposal.cfg)
        print_line(f"  {gib(proposal.peak):>9}  {shlex.join(changes) if changes else '(as configured)'}")


def plan_as_data(plan: Plan, proposals: Sequence[Plan]) -> dict[str, Any]:
    """Bytes and operations as numbers, for JSON."""
    return {
        "fits": plan.fits,
        "world_size": plan.dims.world,
        "num_parameters": num_parameters(plan.setting.architecture),
        "device_bytes": plan.setting.device_bytes,
        "usable_bytes": plan.usable_bytes,
        "peak_bytes": round(plan.peak),
        "stages": [
            {
                "stage": stage.stage,
                "num_parameters": stage.parameters.total,
                **{name: round(value) for name, value in _parts(plan, stage).items()},
                "moment": stage.moment.name,
            }
            for stage in plan.stages
        ],
        "during_rollout_bytes": round(plan.rollout.during_rollout),
        "host_reference_bytes": round(plan.rollout.reference),
        "host_optimizer_bytes": round(plan.rollout.moved_out),
        "flops": {
            name: getattr(plan.flops, name)
            for name in ("training", "recompute", "old_log_probs", "reference", "statistics", "rollout")
        },
        "warnings": warnings_of(plan),
        "proposals": [
            {
                "world_size": proposal.dims.world,
                "peak_bytes": round(proposal.peak),
                "overrides": overrides(plan.cfg, proposal.cfg),
            }
            for proposal in proposals
        ],
    }


def layout_of(plan: Plan) -> str:
    """The mesh in short, such as "TP2 SP DP4"; axes of one rank are left out, but for data parallel."""
    dims = plan.dims
    sizes = {
        "TP": dims.tensor,
        "PP": dims.pipeline,
        "VPP": dims.virtual_pipeline or 1,
        "CP": dims.context,
        "EP": dims.expert,
        "ETP": dims.expert_tensor,
    }
    named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return " ".join([*named, *(["SP"] if dims.sequence_parallel else []), f"DP{dims.data}"])


def _line_printer(console: Console) -> Any:
    # Lines are pasted into shells and logs: no wrapping, no mark-up.
    def print_line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False, highlight=False)

    return print_line


def _memory_table(plan: Plan) -> Table:
    """A column for the first, the worst and the last stage; the worst one is marked."""
    numbers = sorted({0, plan.worst.stage, len(plan.stages) - 1})
    shown = [plan.stages[number] for number in numbers]
    table = Table(box=None, pad_edge=False)
    table.add_column("GiB on one rank of stage")
    for stage in shown:
        worst = " (worst)" if stage is plan.worst and len(shown) > 1 else ""
        table.add_column(f"{stage.stage}{worst}", justify="right")
    columns = [_parts(plan, stage) for stage in shown]
    for name in columns[0]:
        table.add_row(name.replace("_", " "), *(f"{parts[name] / _GIB:,.2f}" for parts in columns))
    table.add_row("at its most in", *(stage.moment.name for stage in shown))
    table.add_row("while samples are drawn", f"{plan.rollout.during_rollout / _GIB:,.2f}")
    return table


def _parts(plan: Plan, stage: StageMemory) -> dict[str, float]:
    """Of one stage during updates; they add up to the last."""
    parts = {
        "weights": stage.weights,
        "gradients": stage.gradients,
        "optimizer_state": stage.optimizer_on_device,
        "activations": stage.moment.activations,
        "vocabulary_end": stage.moment.vocabulary,
        "temporaries": stage.moment.temporaries,
        "rollout_engine": plan.rollout.beside_updates,
    }
    return {**parts, "total_of_an_update": sum(parts.values())}


def _peta(flops: float) -> str:
    return f"{flops / 1e15:.3g}"
