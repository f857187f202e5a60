"""Families by the ``model_type`` of their ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families import deepseek, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.rules import ParamRule


@dataclass(frozen=True)
class Family:
    """``read`` understands config.json; ``rules`` lists the parameters, given the padded vocabulary."""

    read: Callable[[ConfigReader], Architecture]
    rules: Callable[[Architecture, int], Iterable[ParamRule]]


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.read, llama.rules),
    "mistral": Family(mistral.read, mistral.rules),
    "qwen2": Family(qwen2.read, qwen2.rules),
    "qwen3": Family(qwen3.read, qwen3.rules),
    "qwen3_moe": Family(qwen3_moe.read, qwen3_moe.rules),
    "mixtral": Family(mixtral.read, mixtral.rules),
    "deepseek_v2": Family(deepseek.read_v2, deepseek.rules),
    "deepseek_v3": Family(deepseek.read_v3, deepseek.rules),
}


def family_of(model_type: str) -> Family:
    """The family of a model type that is known to be in the registry."""
    return FAMILIES[model_type]
