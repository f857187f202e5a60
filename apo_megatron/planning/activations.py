"""Bytes that the forward pass keeps for the backward pass.

The method is that of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198): go through a layer and count what each operation saves. The layer here is another one:
attention without an S x S matrix (it saves queries, keys, values, its output and one fp32 number a head),
grouped queries, SwiGLU, no dropout, RMSNorm. Names: T tokens of a micro-batch on this rank (its share under
context parallelism), H hidden size, h and k query and KV heads of d, f the width of the network, t the
tensor-parallel size, s = t under sequence parallelism and else 1, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.parameters import layers_of_stage
from apo_megatron.planning.workload import Workload
from apo_megatron.weights.architecture import Architecture, Experts

Recompute = Literal["none", "selective", "full"]
FP32 = 4  # bytes


@dataclass(frozen=True)
class Numerics:
    """How the layers compute, as far as it decides what they save."""

    itemsize: int  # bytes of a parameter and of an activation
    # A CPU has fewer fused kernels: of RMSNorm, of AdamW, of adding bf16 to fp32.
    on_cpu: bool = False

    @property
    def copies_to_accumulate(self) -> float:
        """Copies of a gradient made while it is added to its fp32 buffer: torch on a CPU widens it first."""
        return FP32 / self.itemsize if self.on_cpu and self.itemsize < FP32 else 0.0

    def norm(self, width: float) -> float:
        """Bytes a token that an RMSNorm over ``width`` saves beside its output.

        Fused: the input in its dtype. Made of single operations: the input and the normalised input in fp32.
        Either has one fp32 number of statistics.
        """
        return (8 if self.on_cpu else self.itemsize) * width + 4


def dense_layer_bytes(architecture: Architecture, dims: ParallelDims, numerics: Numerics) -> float:
    """Bytes a token of a layer with a dense network."""
    width = architecture.ffn_hidden_size / dims.tensor
    return _around_attention(architecture, dims, numerics) + _swiglu_bytes(width, numerics)


def expert_layer_bytes(architecture: Architecture, dims: ParallelDims, numerics: Numerics) -> float:
    """Bytes a token of a layer with experts, where the router spreads the tokens evenly.

    Each token of a rank becomes top_k rows, which expert tensor ranks see of each other too. A row keeps its
    b H, and 6 b f in its expert: SwiGLU's and the product with the router's fp32 weight. Beside them the
    router has a flag and an fp32 weight for each token and expert, each row its position and weight (16).
    """
    experts, size = _experts(architecture), numerics.itemsize
    sequence_split = _sequence_split(dims)
    rows = experts.top_k * dims.expert_tensor / sequence_split
    per_row = size * (architecture.hidden_size + experts.ffn_hidden_size / dims.expert_tensor) + 16
    per_row += _swiglu_bytes(experts.ffn_hidden_size / dims.expert_tensor, numerics)
    router = 5 * experts.num_experts / sequence_split
    shared = _swiglu_bytes(experts.shared_ffn_hidden_size / dims.tensor, numerics)
    return _around_attention(architecture, dims, numerics) + rows * per_row + router + shared


@dataclass(frozen=True)
class StageActivations:
    """What the layers of one stage keep on one rank. Bytes."""

    kept: float  # of all micro-batches on the way
    layer_input: float  # of one micro-batch: hidden states between two layers
    layer_gradients: float  # of one micro-batch: at once, while a layer is differentiated
    recomputed: float  # of one micro-batch: made again for its backward
    final_norm: float  # of one micro-batch; on the last stage only

    @staticmethod
    def of(
        architecture: Architecture,
        dims: ParallelDims,
        workload: Workload,
        numerics: Numerics,
        recompute: Recompute,
        stage: int,
    ) -> StageActivations:
        """Full recomputation keeps the input of each layer, and makes one layer's activations again at a
        time. Selective recomputation repeats the attention core, whose inputs and output are kept anyway:
        without an S x S matrix it saves 4 h / t bytes a token."""
        layers = layers_of_stage(architecture.num_layers, dims, stage)
        experts = architecture.experts
        num_expert = 0 if experts is None else sum(experts.layers[layer] for layer in layers)
        num_dense = len(layers) - num_expert
        tokens = workload.tokens_per_micro_batch / dims.context
        split = _sequence_split(dims)
        layer_input = tokens * numerics.itemsize * architecture.hidden_size / split
        saved_by_core = 4 * architecture.num_heads / dims.tensor if recompute == "selective" else 0.0
        dense = (
            tokens * (dense_layer_bytes(architecture, dims, numerics) - saved_by_core) if num_dense else 0.0
        )
        expert = (
            tokens * (expert_layer_bytes(architecture, dims, numerics) - saved_by_core) if num_expert else 0.0
        )
        kept = num_dense * dense + num_expert * expert
        if recompute == "full":
            kept = layer_input * len(layers)
        in_flight = layers_in_flight(dims, stage, len(layers), workload.num_micro_batches(dims))
        largest = max(dense, expert)
        widest = _widest_gradient(architecture, dims, num_dense > 0, num_expert > 0)
        return StageActivations(
            kept=kept * in_flight / len(layers),
            layer_input=layer_input,
            layer_gradients=tokens * numerics.itemsize * (widest + 2 * architecture.hidden_size),
            recomputed=largest if recompute == "full" else 0.0,
            final_norm=tokens * numerics.norm(architecture.hidden_size) / split,
        )


def layers_in_flight(dims: ParallelDims, stage: int, num_layers: int, num_micro_batches: int) -> float:
    """Layers whose activations a stage of ``num_layers`` holds at most, over all micro-batches on the way.

    1F1B (Narayanan et al. 2021, arXiv 2104.04473): the first stage has begun as many micro-batches as there
    are stages when its first backward comes, the last one. Interleaved with v chunks of a stage, in units of
    a chunk: 2 (p - 1 - stage) + (v - 1) p warm-up steps and one more.
    """
    chunks, stages = dims.virtual_pipeline or 1, dims.pipeline
    if chunks == 1:
        units = stages - stage
    else:
        units = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(units, num_micro_batches * chunks) * num_layers / chunks


def _sequence_split(dims: ParallelDims) -> int:
    return dims.tensor if dims.sequence_parallel else 1


def _widest_gradient(
    architecture: Architecture, dims: ParallelDims, has_dense: bool, has_experts: bool
) -> float:
    """Numbers a token of the product of gate and up part, with whose gradient a layer's backward begins."""
    width = architecture.ffn_hidden_size / dims.tensor if has_dense else 0.0
    if has_experts:
        experts = _experts(architecture)
        rows = experts.top_k * dims.expert_tensor / _sequence_split(dims)
        width = max(width, rows * max(experts.ffn_hidden_size / dims.expert_tensor, architecture.hidden_size))
    return width


def _around_attention(architecture: Architecture, dims: ParallelDims, numerics: Numerics) -> float:
    """Both norms with their outputs, which the projections after them save, and attention."""
    size, hidden = numerics.itemsize, architecture.hidden_size
    norms = 2 * (numerics.norm(hidden) + size * hidden) / _sequence_split(dims)
    if architecture.latent_attention is not None:
        return norms + _latent_attention_bytes(architecture, dims, numerics)
    return norms + _grouped_attention_bytes(architecture, dims, numerics)


def _grouped_attention_bytes(architecture: Architecture, dims: ParallelDims, numerics: Numerics) -> float:
    """b (h + 2k) d / t of the projection, whose values attention reads; b (h + k) d / t rotated queries and
    keys; b h d / t and 4 h / t of attention's output and log-sum-exp; the norms of queries and keys."""
    a = architecture
    queries, keys = a.num_heads / dims.tensor, a.num_kv_heads / dims.tensor
    numbers = (queries + 2 * keys) + (queries + keys) + queries
    norms = numerics.norm(a.head_dim) * (queries + keys) if a.qk_norm else 0.0
    return numerics.itemsize * numbers * a.head_dim + 4 * queries + norms


def _latent_attention_bytes(architecture: Architecture, dims: ParallelDims, numerics: Numerics) -> float:
    """The latents, which every rank holds, before and after their norms; projections to the heads' queries,
    keys and values; queries and keys with their rotated part; attention's output and log-sum-exp."""
    mla = architecture.latent_attention
    assert mla is not None
    heads = architecture.num_heads / dims.tensor
    query = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    latents = mla.kv_lora_rank + (mla.q_lora_rank or 0)
    per_head = query + (mla.qk_nope_head_dim + mla.v_head_dim) + 2 * query + mla.v_head_dim
    numbers = latents + mla.qk_rope_head_dim + heads * per_head
    return numerics.itemsize * numbers + numerics.norm(latents) + 4 * heads


def _swiglu_bytes(width: float, numerics: Numerics) -> float:
    """5 b f: gate and up together (2), silu of the gate, the up part with Megatron's offset, the product."""
    return 5 * numerics.itemsize * width


def _experts(architecture: Architecture) -> Experts:
    assert architecture.experts is not None
    return architecture.experts
