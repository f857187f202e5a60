"""Converts with several ranks, there and back, and verifies."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import asdict
from typing import Any

from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.parallel.state import init_parallel
from apo_megatron.parallel.world import CPUWorld, join_cpu_world
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from apo_megatron.weights.conversion.verify import verify_conversion
from checkpoints_convert import hf_to_megatron as hf_to_megatron_command
from checkpoints_convert import verify
from checkpoints_convert.logits import compare_logits
from tests.workers.checkpoints import actor_of, config


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


def save_training_checkpoints(payload: dict[str, Any]) -> list[str]:
    """A checkpoint of every case's model, as training begins; where each is."""
    folders = []
    for case in payload["cases"]:
        cfg = config({"model_path": case["model_path"]}, case["layout"], async_save=False)
        checkpointer = Checkpointer(case["folder"], cfg, actor_of(cfg), {})
        folders.append(str(checkpointer.save(0, {})))
    return folders


def convert_and_die(payload: dict[str, Any]) -> None:
    """Convert, over a checkpoint that may be there, and be killed after so many groups."""
    convert: Any = {"hf_to_megatron": hf_to_megatron, "megatron_to_hf": megatron_to_hf}[payload["direction"]]
    left = payload["groups"]

    def die(num_bytes: int, total_bytes: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(payload["source"], payload["target"], CPUWorld(), overwrite=True, progress=die)


def command_with_full_disk(payload: dict[str, Any]) -> None:
    """The command on two ranks, the second of which cannot write much."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (payload["limit"],) * 2)
    words = ["--hf-path", payload["source"], "--megatron-path", payload["target"]]
    sys.exit(hf_to_megatron_command.main(words))
