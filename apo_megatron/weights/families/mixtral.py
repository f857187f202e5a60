"""Mixtral: Llama attention, softmax-routed experts in every layer, under names of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from apo_megatron.weights.architecture import Architecture, Experts
from apo_megatron.weights.families import blocks, mistral
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.rules import ParamRule


def read(config: ConfigReader) -> Architecture:
    config.expect_to_compute("router_jitter_noise", 0.0, None)
    dense = mistral.read(config, rope_theta=1e6)
    return replace(
        dense,
        experts=Experts(
            num_experts=config.integer("num_local_experts"),
            top_k=config.integer("num_experts_per_tok"),
            ffn_hidden_size=dense.ffn_hidden_size,
            layers=(True,) * dense.num_layers,
        ),
    )


def rules(architecture: Architecture, padded_vocab_size: int) -> Iterator[ParamRule]:
    yield from blocks.ends(architecture, padded_vocab_size)
    yield from blocks.attention(architecture)
    yield from blocks.expert_mlp(
        architecture, "block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2")
    )
