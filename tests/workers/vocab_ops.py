"""Vocabulary-parallel ops on every rank of a gloo world, in groups of several sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from apo_megatron.parallel.vocab import (
    VocabShard,
    vocab_parallel_policy_terms,
    vocab_parallel_reference_terms,
    vocab_parallel_topk,
)

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast")


class CountCollectives:
    """Counts calls of torch.distributed's collectives."""

    def __init__(self) -> None:
        self.count = 0
        for name in COLLECTIVES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function: Any) -> Any:
        def call(*positional: Any, **named: Any) -> Any:
            self.count += 1
            return function(*positional, **named)

        return call

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


def check(payload: dict[str, Any]) -> dict[str, Any]:
    """Every case of the payload in groups of each size: this rank's columns of the results."""
    dist.init_process_group("gloo")
    counter = CountCollectives()
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for size in payload["group_sizes"]:
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
        group, group_rank = groups[rank // size], rank % size
        for name, case in payload["cases"].items():
            logits, vocab_size = case["logits"], case["vocab_size"]
            shard = VocabShard.of_rank(group_rank, size, logits.shape[1], vocab_size, group)
            counter.take()
            result = _run_case(case, shard, counter)
            results[f"{size}/{name}"] = {"start": shard.start, "end": shard.end, **result}
    results["huge ids"] = _top_ids_at_the_end_of_int32()
    dist.destroy_process_group()
    return results


def _top_ids_at_the_end_of_int32() -> torch.Tensor:
    """Top-3 of ascending logits on the last columns of a vocabulary of 2^31: ids that no fp32 can hold."""
    rank, world = dist.get_rank(), dist.get_world_size()
    start = 2**31 - 8 * (world - rank)
    logits = torch.arange(8.0).unsqueeze(0) + 8 * rank
    return vocab_parallel_topk(logits, 3, VocabShard(start, start + 8, 2**31, dist.group.WORLD))[1]


def _run_case(case: dict[str, Any], shard: VocabShard, counter: CountCollectives) -> dict[str, Any]:
    local = case["logits"][:, shard.start : shard.end].clone().requires_grad_()
    top_log_probs, top_ids = vocab_parallel_topk(local, case["k"], shard, case["temperature"])
    num_topk = counter.take()
    reference = vocab_parallel_reference_terms(local, case["targets"], case["k"], shard, case["temperature"])
    num_reference = counter.take()
    terms = vocab_parallel_policy_terms(
        local, case["targets"], case["support_ids"], shard, case["temperature"], case["extra_ids"]
    )
    num_forward = counter.take()
    torch.autograd.backward(terms, case["grads"])
    return {
        "terms": [term.detach() for term in terms],
        "grad": local.grad,
        "top_log_probs": top_log_probs,
        "top_ids": top_ids,
        "reference": list(reference),
        "collectives": [num_topk, num_reference, num_forward, counter.take()],
    }
