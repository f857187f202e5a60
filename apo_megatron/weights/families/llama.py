"""Llama 2, 3 and 3.x: the plain decoder that the other families vary."""

from __future__ import annotations

from collections.abc import Iterator

from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families import blocks
from apo_megatron.weights.families.config_reader import ConfigReader
from apo_megatron.weights.rules import ParamRule


def read(config: ConfigReader) -> Architecture:
    return Architecture(**config.common())


def rules(architecture: Architecture, padded_vocab_size: int) -> Iterator[ParamRule]:
    yield from blocks.ends(architecture, padded_vocab_size)
    yield from blocks.attention(architecture)
    yield from blocks.dense_mlp(architecture)
