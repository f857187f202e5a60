"""Converts with several ranks, there and back, and verifies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.parallel.state import init_parallel
from apo_megatron.parallel.world import join_cpu_world
from apo_megatron.weights.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.megatron_to_hf import megatron_to_hf
from apo_megatron.weights.verify import verify_conversion
from checkpoints_convert import verify
from checkpoints_convert.logits import compare_logits


def there_and_back(payload: dict[str, Any]) -> list[bool]:
    """Whether every conversion is proven, for this rank."""
    world = join_cpu_world()
    proven = []
    for paths in payload["paths"]:
        hf_to_megatron(paths["hf"], paths["megatron"], world)
        proven.append(verify_conversion(paths["hf"], paths["megatron"], world).is_proven)
        megatron_to_hf(paths["megatron"], paths["back"], world, max_shard_bytes=40_000)
    return proven


def verify_with_logits(payload: dict[str, Any]) -> dict[str, Any]:
    """The command's exit code at TP2, and the comparison with two sources, one of them slightly changed."""
    words = ["--hf-path", payload["hf"], "--megatron-path", payload["megatron"], "--logits"]
    result: dict[str, Any] = {"exit_code": verify.main([*words, "--tensor-parallel-size", "2"])}
    parallel = init_parallel(ParallelConfig(tensor_parallel_size=2))
    for name, path in (("same", payload["hf"]), ("changed", payload["changed"])):
        cfg = ModelConfig(hf_path=payload["hf"], dtype="float32")
        comparison = compare_logits(path, payload["megatron"], parallel, cfg)
        result[name] = {**asdict(comparison), "agrees": comparison.agrees}
    return result
