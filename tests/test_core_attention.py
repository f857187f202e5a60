"""Our core attention, padded and packed, against the definition in float64; context-parallel positions.

Context parallelism itself is in test_packed_layouts.py: it needs processes.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from apo_megatron.models.local_modules import SDPACoreAttention
from apo_megatron.models.packed_sequences import PackedSequences, context_positions

LENGTHS = (5, 1, 9, 3)
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 6, 3


def attention(softmax_scale: float | None = None) -> SDPACoreAttention:
    config: Any = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)
    return SDPACoreAttention(config, softmax_scale)


def inputs(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return [
        torch.randn(*shape, *size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]


def definition(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[S, heads, D] of one sequence -> [S, heads * D']."""
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hst,thd->shd", scores.softmax(-1), value).flatten(1)


def check(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weights = torch.arange(found.numel(), dtype=torch.float64).view_as(found).sin()
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    for gradient, value in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(gradient, value, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed_sequences_do_not_see_each_other(scale: float | None) -> None:
    leaves = inputs(sum(LENGTHS))
    packed = PackedSequences.of_lengths(LENGTHS)
    found = attention(scale)(*leaves, packed_seq_params=packed)
    parts = zip(*(leaf.split(LENGTHS) for leaf in leaves), strict=True)
    expected = torch.cat([definition(q, k, v, scale or DIM**-0.5) for q, k, v in parts])
    check(found, expected, leaves)


def test_padded_sequences() -> None:
    leaves = inputs(7, 2)
    query, key, value = leaves
    rows = [definition(query[:, b], key[:, b], value[:, b], DIM**-0.5) for b in range(2)]
    check(attention()(*leaves), torch.stack(rows, dim=1), leaves)


def test_what_megatron_reads_of_packed_sequences() -> None:
    packed = PackedSequences.of_lengths(LENGTHS)
    assert packed.qkv_format == "thd"
    assert cast(Tensor, packed.cu_seqlens_q).tolist() == [0, 5, 6, 15, 18]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 9


@pytest.mark.parametrize("world", [1, 2, 3])
def test_context_ranks_divide_every_sequence_evenly(world: int) -> None:
    """Every position once, every rank as many of each sequence, and equal causal work."""
    lengths = [2 * world * n for n in (3, 1, 4)]
    positions = [context_positions(lengths, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(positions).tolist()) == list(range(sum(lengths)))
    starts = np.cumsum([0, *lengths])
    for number, length in enumerate(lengths):
        mine = [p[(p >= starts[number]) & (p < starts[number + 1])] - starts[number] for p in positions]
        assert {len(part) for part in mine} == {length // world}
        assert len({int((part + 1).sum()) for part in mine}) == 1  # keys that the queries see


def test_a_length_that_does_not_divide_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="6 tokens do not divide into 4 chunks"):
        context_positions([6], 0, 2)
