"""A configuration, a model and a number of ranks -> everything that is predicted of the run."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.config.schema import RLConfig
from apo_megatron.models.layout import check_layout
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.activations import Numerics
from apo_megatron.planning.flops import StepFlops, step_flops
from apo_megatron.planning.memory import StageMemory, update_memory
from apo_megatron.planning.rollout import RolloutMemory, rollout_memory
from apo_megatron.planning.workload import Workload
from apo_megatron.weights.architecture import Architecture

# What is left free: the CUDA context, NCCL's buffers, what the allocator cannot use for its fragments.
MARGIN = 0.1
_ITEMSIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Setting:
    """What is planned for, beside the configuration."""

    architecture: Architecture
    world: int  # ranks of the trainer
    device_bytes: float  # of one rank
    sequence_length: int | None = None  # tokens; None = prompt and response at their longest
    on_cpu: bool = False


@dataclass(frozen=True)
class Plan:
    """The prediction. Bytes of one rank; operations of one step of all ranks."""

    cfg: RLConfig
    setting: Setting
    dims: ParallelDims
    workload: Workload
    stages: tuple[StageMemory, ...]
    rollout: RolloutMemory
    flops: StepFlops

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most during updates."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def update_peak(self) -> float:
        return self.worst.peak + self.rollout.beside_updates

    @property
    def peak(self) -> float:
        return max(self.update_peak, self.rollout.during_rollout)

    @property
    def usable_bytes(self) -> float:
        return (1 - MARGIN) * self.setting.device_bytes

    @property
    def updates_fit(self) -> bool:
        return self.update_peak <= self.usable_bytes

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable_bytes


def make_plan(cfg: RLConfig, setting: Setting) -> Plan:
    """Raises ConfigError where model, mesh and number of ranks do not fit together."""
    dims = ParallelDims.from_config(cfg.parallel, setting.world)
    architecture = setting.architecture
    check_layout(architecture, dims)
    workload = Workload.of(cfg, setting.sequence_length)
    itemsize = _ITEMSIZES[cfg.model.dtype]
    scope = build_objective(cfg.objective).reference_scope
    stages = update_memory(
        architecture,
        dims,
        workload,
        Numerics(itemsize, setting.on_cpu),
        cfg.model.recompute,
        cfg.model.max_logits_mib,
        cfg.model.make_vocab_size_divisible_by,
        cfg.optimizer.offload,
    )
    engine = rollout_memory(
        cfg.rollout,
        architecture,
        dims,
        workload,
        stages,
        itemsize,
        setting.device_bytes,
        has_reference=scope != "none",
        averages_reference=cfg.objective.apo_variants.reference_decay is not None,
        offloads_optimizer=cfg.optimizer.offload,
    )
    flops = step_flops(architecture, workload, cfg.objective, cfg.model.recompute, stages[-1].is_fused)
    return Plan(cfg, setting, dims, workload, tuple(stages), engine, flops)
