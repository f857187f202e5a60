"""The vocabulary ops on a GPU, beside float64 on the CPU; the kernels beside torch on the same GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apo_megatron.config import ParallelConfig
from apo_megatron.parallel import _vocab_kernels, _vocab_rows
from apo_megatron.parallel._vocab_rows_by_device import row_functions
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


def vocab_kernels(payload: dict[str, Any]) -> dict[str, list[Tensor]]:
    """What kernels and torch give for the same logits [rows, width], of which ``num_columns`` are tokens.

    Made on the GPU from a seed, because they are large. torch sees the last ``num_compared`` rows only.
    """
    device = init_parallel(ParallelConfig()).device
    generator = torch.Generator(device).manual_seed(0)
    num_rows, num_columns, num_compared = (payload[n] for n in ("rows", "num_columns", "num_compared"))
    whole = torch.empty(num_rows, payload["width"], device=device, dtype=payload["dtype"])
    whole.normal_(std=4.0, generator=generator)
    whole[:, num_columns:] = torch.nan
    logits = whole[:, :num_columns]
    assert row_functions(logits) is _vocab_kernels
    columns = torch.randint(num_columns, (num_rows, 9), device=device, generator=generator)
    columns[:, 1] = columns[:, 0]
    grads, coefficients = (torch.randn(num_rows, n, device=device, generator=generator) for n in (9, 2))
    last = slice(num_rows - num_compared, None)
    copy = whole[last].clone()

    found: dict[str, list[Tensor]] = {}
    for name, functions, part, rows in (
        ("torch", _vocab_rows, copy[:, :num_columns], last),
        ("kernels", _vocab_kernels, logits, slice(None)),
    ):
        statistics = functions.row_statistics(part, 1.3)
        candidates = functions.best_columns(part, 8, 1.3)
        exp_coeff, weighted_coeff = coefficients[rows].unbind(1)
        functions.overwrite_with_gradient(
            part, 1.3, statistics.row_max, exp_coeff, weighted_coeff, columns[rows], grads[rows]
        )
        results = [*statistics, *candidates, part[:, :num_columns]]
        found[name] = [result[-num_compared:].cpu() for result in results]
    return found
