"""Device memory of one rank of every pipeline stage, at the moments at which it can be at its most."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.models.layout import padded_vocab_size
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.activations import FP32, Numerics, Recompute, StageActivations
from apo_megatron.planning.moments import Moment, moments_of_update
from apo_megatron.planning.parameters import StageParameters, stage_parameters
from apo_megatron.planning.vocabulary import VocabularyEnd
from apo_megatron.planning.workload import Workload
from apo_megatron.weights.architecture import Architecture


@dataclass(frozen=True)
class StageMemory:
    """One rank of a stage during an update. Bytes."""

    stage: int
    parameters: StageParameters
    weights: float
    gradients: float
    optimizer: float  # of the state
    optimizer_on_device: float  # of it, at the moment at which most is needed
    moment: Moment  # at which most is needed
    logits: float  # of a micro-batch, as a whole; 0 where there are none
    is_fused: bool  # they never exist: the LM head is fused

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimizer_on_device + self.moment.total


def update_memory(
    architecture: Architecture,
    dims: ParallelDims,
    workload: Workload,
    numerics: Numerics,
    recompute: Recompute = "none",
    max_logits_mib: int = 1024,
    make_vocab_size_divisible_by: int = 128,
    offloads_optimizer: bool = False,
) -> list[StageMemory]:
    """The memory of one rank of every stage, for a layout that ``check_layout`` accepts."""
    padded = padded_vocab_size(architecture.vocab_size, make_vocab_size_divisible_by, dims.tensor)
    stages = []
    for stage, parameters in enumerate(stage_parameters(architecture, dims, padded)):
        end = None
        if stage == dims.pipeline - 1:
            end = VocabularyEnd(
                architecture.hidden_size,
                workload.trained_per_micro_batch / dims.context,
                padded // dims.tensor,
                numerics,
                max_logits_mib,
                shares_embedding=architecture.tied and dims.pipeline == 1,
                gradient_in_place=not dims.overlap_grad_reduce,
            )
        activations = StageActivations.of(architecture, dims, workload, numerics, recompute, stage)
        optimizer = optimizer_bytes(parameters, dims, numerics)
        on_device, moment = max(
            (
                (optimizer if moment.needs_optimizer or not offloads_optimizer else 0.0, moment)
                for moment in moments_of_update(dims, numerics, parameters, activations, end)
            ),
            key=lambda item: item[0] + item[1].total,
        )
        stages.append(
            StageMemory(
                stage=stage,
                parameters=parameters,
                weights=parameters.total * numerics.itemsize + parameters.buffers * FP32,
                gradients=parameters.total * FP32,
                optimizer=optimizer,
                optimizer_on_device=on_device,
                moment=moment,
                logits=0.0 if end is None else end.logits,
                is_fused=end is not None and end.is_fused,
            )
        )
    return stages


def optimizer_bytes(parameters: StageParameters, dims: ParallelDims, numerics: Numerics) -> float:
    """Adam's two fp32 moments of every number, and an fp32 main copy where parameters are narrower.

    The distributed optimizer divides them over the ranks that hold the same parameters (ZeRO stage 1,
    Rajbhandari et al. 2019, arXiv 1910.02054): those of the data and context axes, for experts those that
    hold copies of them.
    """
    per_number = 2 * FP32 + (FP32 if numerics.itemsize < FP32 else 0)
    dense_ranks = dims.data * dims.context if dims.distributed_optimizer else 1
    expert_ranks = dims.world // dims.expert_model if dims.distributed_optimizer else 1
    dense = parameters.total - parameters.experts
    return per_number * (dense / dense_ranks + parameters.experts / expert_ranks)
