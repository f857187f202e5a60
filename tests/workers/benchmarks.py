"""The benchmarks of tools/ in a world of gloo processes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apo_megatron.config import ParallelConfig
from apo_megatron.parallel.state import init_parallel
from tools.measurement import with_cost
from tools.memory_curve import TinyModel


def run_command(payload: dict[str, Any]) -> None:
    """The command line of a tool, in the world that it finds."""
    importlib.import_module(payload["module"]).main(payload["arguments"])


def known_costs(payload: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Of calls whose costs are known."""
    parallel = init_parallel(ParallelConfig())
    kept: list[torch.Tensor] = []

    def keep_one_of_two() -> None:
        kept.append(torch.zeros(1000))
        torch.zeros(3000)

    def communicate() -> None:
        dist.all_reduce(torch.zeros(10, 3))
        dist.all_reduce(torch.zeros(5, dtype=torch.int64), op=dist.ReduceOp.MAX)
        parts = torch.zeros(4 * parallel.world, dtype=torch.bfloat16)
        dist.all_gather_into_tensor(parts, torch.zeros(4, dtype=torch.bfloat16))
        if parallel.rank == 0:
            dist.send(torch.zeros(7, dtype=torch.bool), 1)
        else:
            dist.recv(torch.zeros(7, dtype=torch.bool), 0)

    calls = {"memory": keep_one_of_two, "freeing": kept.clear, "traffic": communicate}
    return {name: vars(with_cost(call, parallel)[1]) for name, call in calls.items()}


def whole_updates(payload: dict[str, Any]) -> dict[str, list[int]]:
    """Peak bytes of an update at each length, by ``max_logits_mib`` and vocabulary."""
    parallel = init_parallel(ParallelConfig())
    peaks = {}
    for vocab_size, max_logits_mib in payload["models"]:
        folder = Path(payload["folder"], f"{vocab_size}_{max_logits_mib}")
        model = TinyModel(folder, vocab_size, max_logits_mib, parallel)
        peaks[f"{vocab_size} {max_logits_mib}"] = [model.peak_bytes(length) for length in payload["lengths"]]
    return peaks
