"""The moments of an update at which most memory can be needed, beside weights, gradients and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.activations import FP32, Numerics, StageActivations
from apo_megatron.planning.parameters import StageParameters
from apo_megatron.planning.vocabulary import VocabularyEnd


@dataclass(frozen=True)
class Moment:
    """What is on the device beside the state. Bytes."""

    name: str
    activations: float = 0.0
    vocabulary: float = 0.0
    temporaries: float = 0.0
    needs_optimizer: bool = False  # its state is on the device even with optimizer.offload

    @property
    def total(self) -> float:
        return self.activations + self.vocabulary + self.temporaries


def moments_of_update(
    dims: ParallelDims,
    numerics: Numerics,
    parameters: StageParameters,
    activations: StageActivations,
    end: VocabularyEnd | None,
) -> list[Moment]:
    """Of one rank of a stage; ``end`` is what the last stage has beyond the others."""
    waiting = 0.0 if end is None else end.gradient_that_waits
    exchanged = 2 * activations.layer_input if dims.pipeline > 1 else 0.0
    # While the last layer is differentiated, nothing of the others is free yet.
    weight_gradient = parameters.largest_in_layers * numerics.itemsize
    layer_gradients = activations.layer_gradients + weight_gradient
    moments = [
        Moment(
            "backward of a layer",
            activations.kept + activations.recomputed,
            waiting,
            layer_gradients + exchanged,
        ),
        Moment("gradient reduction", temporaries=_reduction_temporaries(dims, numerics, parameters)),
        Moment(
            "optimizer step",
            temporaries=_optimizer_temporaries(dims, numerics, parameters),
            needs_optimizer=True,
        ),
    ]
    if parameters.embedding:
        gradient = parameters.embedding * numerics.itemsize * (1 + numerics.copies_to_accumulate)
        moments.append(Moment("backward of the embedding", 0.0, waiting, gradient))
    if end is not None:
        kept = activations.kept + activations.final_norm
        moments.append(Moment("forward of the LM head", kept, end.forward(), exchanged))
        moments.append(Moment("backward of the LM head", kept, end.backward(), exchanged))
        moments.append(Moment("gradient of the LM head", kept, end.accumulation(), exchanged))
    return moments


def _reduction_temporaries(dims: ParallelDims, numerics: Numerics, parameters: StageParameters) -> float:
    """Gloo's reduce-scatter works on a copy of its input, one buffer after the other; NCCL's does not."""
    if not (numerics.on_cpu and dims.distributed_optimizer):
        return 0.0
    return FP32 * max(parameters.total - parameters.experts, parameters.experts)


def _optimizer_temporaries(dims: ParallelDims, numerics: Numerics, parameters: StageParameters) -> float:
    """What a step of AdamW makes beside its state: nothing in the fused kernel of TransformerEngine or Apex;
    on a CPU two fp32 tensors of the size of the largest parameter's share."""
    if not numerics.on_cpu:
        return 0.0
    ranks = dims.data * dims.context if dims.distributed_optimizer else 1
    return 2 * FP32 * parameters.largest / ranks
