"""The fused LM head on every rank of a gloo world, in groups of several sizes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from apo_megatron.parallel.vocab_shard import VocabShard
from tests.lm_head_cases import run_case
from tests.workers.vocab_ops import CountCollectives


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """Every case of the payload in groups of each size: this rank's results."""
    dist.init_process_group("gloo")
    counter = CountCollectives()
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for size in payload["group_sizes"]:
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
        group, group_rank = groups[rank // size], rank % size
        for name, case in payload["cases"].items():
            shard = VocabShard.of_rank(group_rank, size, len(case["weight"]), case["vocab_size"], group)
            counter.take()
            results[f"{size}/{name}"] = run_case(case, shard, counter.take)
    dist.destroy_process_group()
    return results
