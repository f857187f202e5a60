"""The shape of a model, as pure data: what ``config.json`` says and weights and layers are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency-dependent stretching of the rotary embedding, as Llama 3.1 and later use it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071) as DeepSeek uses it: stretched frequencies and a scaled softmax."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from a small latent."""

    q_lora_rank: int | None  # None = queries are projected directly
    kv_lora_rank: int
    qk_nope_head_dim: int  # the part of each head without rotary embedding
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Experts:
    """A mixture of SwiGLU experts in place of the feed-forward network of some layers."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int  # of one routed expert
    layers: tuple[bool, ...]  # which layers have experts; the others are dense
    shared_ffn_hidden_size: int = 0  # of the expert that every token visits; 0 = there is none
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True  # the weights of the chosen experts sum to 1
    scaling_factor: float = 1.0
    selection_bias: bool = False  # a bias per expert that decides the choice but not the weight
    num_groups: int | None = None  # experts are chosen from the best ``top_k_groups`` of so many groups
    top_k_groups: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder: RMSNorm, rotary embedding, grouped-query or latent attention, SwiGLU or experts of it."""

    model_type: str  # the family, by the name that config.json has for it
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # need not be hidden_size / num_heads
    ffn_hidden_size: int  # of the dense layers
    vocab_size: int  # without the padding that tensor parallelism adds
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | YarnRopeScaling | None
    tied: bool  # the output layer is the input embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of the queries and the keys
    latent_attention: LatentAttention | None = None
    experts: Experts | None = None
    # Layers after the last that predict tokens further ahead (DeepSeek-V3). They are neither trained nor
    # converted, and transformers does not load them either.
    num_prediction_layers: int = 0

    @property
    def layers_are_alike(self) -> bool:
        """Whether every layer has the same parameters; Megatron then stacks them in its checkpoints."""
        return self.experts is None or all(self.experts.layers)
