"""The memory that the ranks take while they train."""

from __future__ import annotations

import psutil
import torch

from apo_megatron.parallel.collectives import all_reduce_max
from apo_megatron.parallel.world import World

_GIB = 2**30


def memory_metrics(parallel: World) -> dict[str, float]:
    """Of the largest rank, in GiB; collective. ``memory/host_gib``: what its process holds now;
    ``memory/gpu_peak_gib``, on GPUs: the most that its tensors took since the last call."""
    metrics = {"memory/host_gib": all_reduce_max(psutil.Process().memory_info().rss, parallel) / _GIB}
    if parallel.device.type != "cpu":
        peak = torch.cuda.max_memory_allocated(parallel.device)
        torch.cuda.reset_peak_memory_stats(parallel.device)
        metrics["memory/gpu_peak_gib"] = all_reduce_max(peak, parallel) / _GIB
    return metrics
