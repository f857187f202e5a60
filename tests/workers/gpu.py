"""The vocabulary ops on a GPU, beside float64 on the CPU."""

from __future__ import annotations

from typing import Any

from apo_megatron.config import ParallelConfig
from apo_megatron.parallel.state import init_parallel
from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk


def vocab_ops(payload: dict[str, Any]) -> dict[str, Any]:
    """Terms, gradient and Top-K of the payload's logits on this rank's device, as CPU tensors."""
    parallel = init_parallel(ParallelConfig())
    logits = payload["logits"].to(parallel.device)
    shard = VocabShard(0, logits.shape[1], payload["vocab_size"], parallel.tensor_group)
    topk = vocab_parallel_topk(logits, 8, shard)
    leaf = logits.clone().requires_grad_()
    terms = vocab_parallel_policy_terms(
        leaf * 1.0, payload["targets"].to(parallel.device), payload["ids"].to(parallel.device), shard
    )
    (terms.log_probs.sum() + 2 * terms.anchor_log_mass.sum() + 3 * terms.entropy.sum()).backward()
    assert leaf.grad is not None
    found = [parallel.backend, *topk, *terms, leaf.grad]
    return {"backend": found[0], "values": [value.cpu() for value in found[1:]]}
