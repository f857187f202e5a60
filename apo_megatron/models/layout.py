"""Which meshes can divide a model, and how its vocabulary is padded. Pure."""

from __future__ import annotations

from apo_megatron.errors import ConfigError
from apo_megatron.models.expert_config import check_experts
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.architecture import Architecture


def padded_vocab_size(vocab_size: int, make_vocab_size_divisible_by: int, tensor_parallel_size: int) -> int:
    """The smallest multiple of the two factors' product that holds the vocabulary."""
    multiple = make_vocab_size_divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def check_layout(architecture: Architecture, dims: ParallelDims) -> None:
    """Raises ConfigError where the model cannot be divided as the mesh asks."""
    for field, size in (
        ("num_attention_heads", architecture.num_heads),
        ("num_key_value_heads", architecture.num_kv_heads),
        ("intermediate_size", architecture.ffn_hidden_size),
    ):
        if size % dims.tensor:
            raise ConfigError(
                f"parallel.tensor_parallel_size={dims.tensor} must divide {field}={size} of the model: "
                f"choose a divisor of {size}"
            )
    num_chunks = dims.pipeline * (dims.virtual_pipeline or 1)
    if architecture.num_layers % num_chunks:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={dims.pipeline} x virtual_pipeline_parallel_size="
            f"{dims.virtual_pipeline or 1} = {num_chunks} must divide num_hidden_layers="
            f"{architecture.num_layers} of the model"
        )
    check_experts(architecture, dims)
