"""What to tell a user about a plan, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from apo_megatron.config.schema import RLConfig
from apo_megatron.planning.plan import Plan, make_plan
from apo_megatron.planning.proposals import RANKS_PER_NODE
from apo_megatron.planning.rollout import ASSUMED_MEM_FRACTION, memory_fraction

_GIB = 2**30
_LARGE_SHARE = 0.05  # of the device: worth a sentence
_SMALL_SHARE = 0.01  # less is not
_LONG_WAIT = 0.2  # of a pipeline's time


def gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:,.1f} GiB"


def warnings_of(plan: Plan) -> list[str]:
    """What will not fit, then what is wasteful."""
    checks: tuple[Callable[[Plan], Iterator[str]], ...] = (
        _updates_that_do_not_fit,
        _rollouts_that_do_not_fit,
        _state_that_could_wait,
        _large_logits,
        _needless_recomputation,
        _unsharded_state,
        _wide_tensor_parallelism,
        _idle_pipeline,
    )
    return [message for check in checks for message in check(plan)]


def _updates_that_do_not_fit(plan: Plan) -> Iterator[str]:
    if plan.updates_fit:
        return
    stage = plan.worst
    parts = {
        "weights, gradients and optimizer state": stage.peak - stage.moment.total,
        "activations": stage.moment.activations,
        "the vocabulary end": stage.moment.vocabulary,
        "the embedded rollout engine": plan.rollout.beside_updates,
    }
    largest = max(parts, key=lambda name: parts[name])
    yield (
        f"updates need {gib(plan.update_peak)} on stage {stage.stage} ({stage.moment.name}), usable are "
        f"{gib(plan.usable_bytes)}; most of it is {largest} ({gib(parts[largest])})"
    )


def _rollouts_that_do_not_fit(plan: Plan) -> Iterator[str]:
    rollout = plan.cfg.rollout
    if plan.rollout.during_rollout <= plan.usable_bytes:
        return
    needed = f"rollouts need {gib(plan.rollout.during_rollout)}, usable are {gib(plan.usable_bytes)}"
    if rollout.engine == "embedded":
        yield f"{needed}: the embedded engine is a whole model on every rank; set rollout.engine=sglang"
    elif rollout.sglang.colocated:
        fraction = memory_fraction(rollout)
        room = (plan.usable_bytes - plan.rollout.during_rollout) / plan.setting.device_bytes + fraction
        assumed = " (assumed)" if fraction == ASSUMED_MEM_FRACTION else ""
        yield (
            f"{needed}: the server takes {fraction:.0%}{assumed} beside the trainer's weights; give "
            f"rollout.sglang.server_args --mem-fraction-static {max(room, 0.0):.2f}"
        )
    elif plan.updates_fit:
        yield f"{needed}: lower rollout.bucket_mib"


def _state_that_could_wait(plan: Plan) -> Iterator[str]:
    if plan.updates_fit or plan.cfg.optimizer.offload:
        return
    saved = plan.update_peak - _with(plan, "optimizer", offload=True).update_peak
    if saved > 0:
        yield f"optimizer.offload=true would save {gib(saved)} a rank, for two copies per update"


def _large_logits(plan: Plan) -> Iterator[str]:
    last = plan.stages[-1]
    if last.is_fused or last.logits < _LARGE_SHARE * plan.setting.device_bytes:
        return
    limit = max(1, int(plan.workload.tokens_per_micro_batch * 512 * 2**20 / last.logits))
    yield (
        f"logits of {plan.workload.trained_per_micro_batch:,} tokens take {gib(last.logits)}: set "
        f"model.max_logits_mib lower, or train.max_tokens_per_micro_batch to about {limit:,}"
    )


def _needless_recomputation(plan: Plan) -> Iterator[str]:
    mode = plan.cfg.model.recompute
    if mode == "none":
        return
    without = _with(plan, "model", recompute="none")
    cost = plan.flops.recompute / plan.flops.trainer
    if without.fits:
        yield (
            f"model.recompute={mode} costs {cost:.0%} of the arithmetic, and without it {gib(without.peak)} "
            "would fit: set none"
        )
    elif mode == "selective":
        yield (
            f"model.recompute=selective saves {gib(without.peak - plan.peak)} only, for attention here keeps "
            "no S x S matrix: set full or none"
        )


def _unsharded_state(plan: Plan) -> Iterator[str]:
    for field, value, is_wasted in (
        ("sequence_parallel", True, plan.dims.tensor > 1 and not plan.dims.sequence_parallel),
        (
            "distributed_optimizer",
            True,
            plan.dims.data * plan.dims.context > 1 and not plan.dims.distributed_optimizer,
        ),
    ):
        if is_wasted:
            saved = plan.update_peak - _with(plan, "parallel", **{field: value}).update_peak
            if saved > _SMALL_SHARE * plan.setting.device_bytes:
                yield f"parallel.{field}=true would save {gib(saved)} a rank"


def _wide_tensor_parallelism(plan: Plan) -> Iterator[str]:
    if plan.dims.tensor > RANKS_PER_NODE:
        yield (
            f"parallel.tensor_parallel_size={plan.dims.tensor} leaves a node of {RANKS_PER_NODE} ranks: "
            "every layer then waits for the network between nodes; use pipeline stages instead"
        )


def _idle_pipeline(plan: Plan) -> Iterator[str]:
    """A pipeline of p stages idles (p - 1) / (v m) of the time it works (arXiv 2104.04473)."""
    stages, chunks = plan.dims.pipeline, plan.dims.virtual_pipeline or 1
    number = plan.workload.num_micro_batches(plan.dims)
    idle = (stages - 1) / (chunks * number + stages - 1)
    if idle > _LONG_WAIT:
        yield (
            f"{stages} stages with {number} micro-batches a rank and update stand idle {idle:.0%} of the "
            "time: use fewer stages or smaller micro-batches, or lower train.num_mini_batches"
        )


def _with(plan: Plan, section: str, **changes: Any) -> Plan:
    part = getattr(plan.cfg, section).model_copy(update=changes)
    cfg: RLConfig = plan.cfg.model_copy(update={section: part})
    return make_plan(cfg, plan.setting)
