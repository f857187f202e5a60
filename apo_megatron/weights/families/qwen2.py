"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.families.llama import rules

__all__ = ["read", "rules"]


def read(config: ConfigReader) -> Architecture:
    return Architecture(**config.common(), qkv_bias=True)
