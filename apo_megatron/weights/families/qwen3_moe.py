"""Qwen3-MoE: Qwen3 attention, softmax-routed experts in every layer or every few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from apo_megatron.weights.architecture import Architecture, Experts
from apo_megatron.weights.families import blocks, qwen3
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.rules import ParamRule


def read(config: ConfigReader) -> Architecture:
    dense = qwen3.read(config)
    step = config.integer("decoder_sparse_step") if "decoder_sparse_step" in config.config else 1
    only_dense = set(config.config.get("mlp_only_layers") or ())
    return replace(
        dense,
        experts=Experts(
            num_experts=config.integer("num_experts", "num_local_experts"),
            top_k=config.integer("num_experts_per_tok"),
            ffn_hidden_size=config.integer("moe_intermediate_size"),
            layers=tuple(
                layer not in only_dense and (layer + 1) % step == 0 for layer in range(dense.num_layers)
            ),
            normalize_top_k=config.flag("norm_topk_prob", default=False),
        ),
    )


def rules(architecture: Architecture, padded_vocab_size: int) -> Iterator[ParamRule]:
    yield from blocks.ends(architecture, padded_vocab_size)
    yield from blocks.attention(architecture)
    yield from blocks.dense_or_expert_mlp(architecture)
