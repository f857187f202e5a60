"""DeepSeek-V2 and V3: latent attention, dense layers first, then routed and shared experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from apo_megatron.weights.architecture import Architecture, Experts, LatentAttention
from apo_megatron.weights.families import blocks
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.rules import ParamRule


def read_v2(config: ConfigReader) -> Architecture:
    # V2 groups by the best expert, which Megatron's router, made for V3's sum of two, does not compute.
    config.expect_to_compute("topk_method", "greedy")
    config.expect_to_compute("scoring_func", "softmax")
    config.expect_to_compute("norm_topk_prob", False)
    return _read(config, score_function="softmax", normalize_top_k=False)


def read_v3(config: ConfigReader) -> Architecture:
    config.expect("topk_method", "noaux_tc")  # the others have no selection bias
    config.expect_to_compute("scoring_func", "sigmoid")
    config.expect_to_compute("norm_topk_prob", True)
    config.expect_to_compute("rope_interleave", True, None)
    return _read(
        config,
        score_function="sigmoid",
        selection_bias=True,
        num_groups=config.integer("n_group"),
        top_k_groups=config.integer("topk_group"),
    )


def _read(config: ConfigReader, **routing: Any) -> Architecture:
    config.expect("moe_layer_freq", 1)
    # The norms of the latents always have this one; Megatron has one for all.
    config.expect_to_compute("rms_norm_eps", 1e-6)
    common = config.common(rope_types=("default", "yarn"))
    num_layers, expert_size = common["num_layers"], config.integer("moe_intermediate_size")
    num_dense = config.count("first_k_dense_replace")
    return Architecture(
        **common,
        latent_attention=LatentAttention(
            q_lora_rank=config.optional_integer("q_lora_rank"),
            kv_lora_rank=config.integer("kv_lora_rank"),
            qk_nope_head_dim=config.integer("qk_nope_head_dim"),
            qk_rope_head_dim=config.integer("qk_rope_head_dim"),
            v_head_dim=config.integer("v_head_dim"),
        ),
        experts=Experts(
            num_experts=config.integer("n_routed_experts"),
            top_k=config.integer("num_experts_per_tok"),
            ffn_hidden_size=expert_size,
            layers=tuple(layer >= num_dense for layer in range(num_layers)),
            shared_ffn_hidden_size=expert_size * config.count("n_shared_experts"),
            scaling_factor=config.number("routed_scaling_factor", default=1.0),
            **routing,
        ),
        num_prediction_layers=config.count("num_nextn_predict_layers"),
    )


def rules(architecture: Architecture, padded_vocab_size: int) -> Iterator[ParamRule]:
    yield from blocks.ends(architecture, padded_vocab_size)
    yield from blocks.latent_attention(architecture)
    yield from blocks.dense_or_expert_mlp(architecture)
