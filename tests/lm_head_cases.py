"""Inputs of the fused LM head, and a run of one rank's share of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from apo_megatron.parallel.lm_head import TileSize, lm_head_policy_terms, lm_head_topk
from apo_megatron.parallel.vocab_shard import VocabShard
from tests.test_vocab_ops import make_case

HIDDEN_SIZE = 12


def head_case(
    num_rows: int = 7, *, tile: tuple[int, int] | None = (3, 5), levels: int | None = None, **options: Any
) -> dict[str, Any]:
    """Targets, ids and gradients of make_case; hidden states and weight instead of its logits.

    ``levels``: small whole numbers instead of Gaussian ones, so that logits are exact in bf16, with ties.
    """
    dtype, spread = options.get("dtype", torch.float64), options.get("spread", 3.0)
    case = make_case(num_rows, **options)
    padded = case.pop("logits").shape[1]
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    shapes = (num_rows, HIDDEN_SIZE), (padded, HIDDEN_SIZE)
    if levels is None:
        hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
        weight *= spread / math.sqrt(HIDDEN_SIZE)
    else:
        hidden, weight = (torch.randint(-levels, levels + 1, shape, generator=generator) for shape in shapes)
        weight = weight / 4
    weight[case["vocab_size"] :] = options.get("padding", math.nan)
    return {**case, "hidden": hidden.to(dtype), "weight": weight.to(dtype), "tile": tile}


CASES: dict[str, dict[str, Any]] = {
    "plain": head_case(),
    "cool": head_case(temperature=0.5, padding=math.inf, seed=1),
    "warm": head_case(temperature=2.0, seed=2),
    "no padding": head_case(vocab_size=48, seed=3),
    "last rank all padding": head_case(vocab_size=30, k=40, padding=1e300, seed=4),
    "no support": head_case(num_ids=0, seed=5),
    "one support id": head_case(num_ids=1, k=1, seed=6),
    "no rows": head_case(num_rows=0, seed=7),
    "peaked": head_case(spread=60.0, seed=8),
    "rows divide into tiles": head_case(num_rows=9, tile=(3, 4), seed=9),
    "a tile for each logit": head_case(3, vocab_size=21, padded=24, tile=(1, 1), seed=10),
    "one tile": head_case(tile=None, seed=11),
    "fp32": head_case(40, vocab_size=301, padded=304, dtype=torch.float32, tile=(16, 50), seed=12),
    "fp32 wide": head_case(
        9, vocab_size=6001, padded=6004, num_ids=8, dtype=torch.float32, temperature=0.7, tile=None, seed=13
    ),
    "bf16": head_case(40, vocab_size=301, padded=304, dtype=torch.bfloat16, tile=(16, 50), levels=4, seed=14),
    "bf16 wide": head_case(
        9, vocab_size=6001, padded=6004, num_ids=8, dtype=torch.bfloat16, tile=None, levels=2, seed=15
    ),
    "ties": head_case(levels=1, k=20, seed=16),
}


def run_case(
    case: dict[str, Any], shard: VocabShard, take_count: Callable[[], int] = lambda: 0
) -> dict[str, Any]:
    """Results of one rank, with the collectives of Top-K, forward and backward by ``take_count``."""
    hidden = case["hidden"].clone().requires_grad_()
    weight = case["weight"][shard.start : shard.end].clone().requires_grad_()
    tile = None if case["tile"] is None else TileSize(*case["tile"])
    targets, temperature = case["targets"], case["temperature"]
    reference = lm_head_topk(hidden, weight, targets, case["k"], shard, temperature, tile=tile)
    num_topk = take_count()
    ids = case["support_ids"], shard, temperature, case["extra_ids"]
    terms = lm_head_policy_terms(hidden, weight, targets, *ids, tile=tile)
    num_forward = take_count()
    torch.autograd.backward(terms, case["grads"])
    return {
        "terms": [term.detach() for term in terms],
        "reference": list(reference),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "collectives": [num_topk, num_forward, take_count()],
    }
