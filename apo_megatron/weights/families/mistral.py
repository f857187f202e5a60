"""Mistral: Llama with a sliding window in some releases, which is refused."""

from __future__ import annotations

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.families.llama import rules

__all__ = ["read", "rules"]


def read(config: ConfigReader, rope_theta: float = 10000.0) -> Architecture:
    config.expect_to_compute("sliding_window", None)
    return Architecture(**config.common(rope_theta=rope_theta))
