"""The shape of a model, as pure data: what ``config.json`` says and weights and layers are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelType = Literal["qwen2", "qwen3", "llama"]


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency-dependent stretching of the rotary embedding, as Llama 3.1 and later use it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """A dense decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU."""

    model_type: ModelType
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # need not be hidden_size / num_heads
    ffn_hidden_size: int
    vocab_size: int  # without the padding that tensor parallelism adds
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tied: bool  # the output layer is the input embedding
    qkv_bias: bool
    qk_norm: bool  # RMSNorm over each head of the queries and the keys
