"""How many parameters a rank of each pipeline stage holds: counted from the shapes of the weight table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.rules import ParamRule
from apo_megatron.weights.table import build_table

_EMBEDDING, _FINAL_NORM, _OUTPUT = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)


@dataclass(frozen=True)
class StageParameters:
    """Numbers of one rank of a stage; all ranks of a stage hold equally many."""

    layers: tuple[int, ...]  # of the whole model, from 0
    dense: int  # attention, norms, dense networks, routers, shared experts
    experts: int  # routed
    embedding: int
    output: int  # 0 where it is the stage's embedding
    largest: int  # numbers of the largest parameter
    largest_in_layers: int
    buffers: int  # fp32 numbers that are not trained

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.embedding + self.output


def layers_of_stage(num_layers: int, dims: ParallelDims, stage: int) -> tuple[int, ...]:
    """Layers that Megatron gives to a stage: one run of layers per model chunk."""
    num_chunks = dims.virtual_pipeline or 1
    size = num_layers // (dims.pipeline * num_chunks)
    starts = [(chunk * dims.pipeline + stage) * size for chunk in range(num_chunks)]
    return tuple(layer for start in starts for layer in range(start, start + size))


def stage_parameters(
    architecture: Architecture, dims: ParallelDims, padded_vocab_size: int
) -> list[StageParameters]:
    """The parameters of one rank of every stage, of a layout that ``check_layout`` accepts."""
    rules = build_table(architecture, padded_vocab_size).rules
    return [_of_stage(architecture, rules, dims, stage) for stage in range(dims.pipeline)]


def num_parameters(architecture: Architecture) -> int:
    """Trained numbers of the whole model, without padding; a tied output layer counts once."""
    (whole,) = stage_parameters(architecture, ParallelDims(world=1), architecture.vocab_size)
    return whole.total


def _of_stage(
    architecture: Architecture, rules: tuple[ParamRule, ...], dims: ParallelDims, stage: int
) -> StageParameters:
    layers = layers_of_stage(architecture.num_layers, dims, stage)
    is_first, is_last = stage == 0, stage == dims.pipeline - 1
    present = {
        _EMBEDDING: is_first,
        _FINAL_NORM: is_last,
        _OUTPUT: is_last and not (architecture.tied and is_first),
    }
    counts = {"dense": 0, "experts": 0, "embedding": 0, "output": 0, "buffers": 0}
    kinds = {_EMBEDDING: "embedding", _OUTPUT: "output"}
    largest = largest_in_layers = 0
    for rule in rules:
        size = math.prod(rule.layout.local_shape(dims.expert_tensor if rule.num_experts else dims.tensor))
        if not rule.is_per_layer:
            number = int(present[rule.megatron_name])
        else:
            number = len(layers if rule.layers is None else set(layers) & set(rule.layers))
            number *= rule.num_experts // dims.expert if rule.num_experts else 1
        kind = "experts" if rule.num_experts else kinds.get(rule.megatron_name, "dense")
        counts["buffers" if rule.keeps_dtype else kind] += number * size
        if number:
            largest = max(largest, size)
            largest_in_layers = max(largest_in_layers, size if rule.is_per_layer else 0)
    return StageParameters(layers, largest=largest, largest_in_layers=largest_in_layers, **counts)
