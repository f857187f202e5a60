"""Qwen3, dense: Llama with a norm over each head of queries and keys, and a head_dim of its own."""

from __future__ import annotations

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.families.llama import rules

__all__ = ["read", "rules"]


def read(config: ConfigReader) -> Architecture:
    config.integer("head_dim")  # its default is not hidden_size / num_attention_heads
    return Architecture(**config.common(), qk_norm=True)
