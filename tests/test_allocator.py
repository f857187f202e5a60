"""What is known of a prompt, and whether samples are spent better for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.objectives.sample_allocations import group_value
from apo_megatron.rollout.allocation import NUM_POOLED, NUM_TRUSTED, SampleAllocator
from apo_megatron.types import Prompt

GROUP_SIZE = 8


def prompt(number: int) -> Prompt:
    return Prompt(f"p{number}", "", np.zeros(1, np.int32), {})


def allocator(**rollout: Any) -> SampleAllocator:
    return SampleAllocator(RolloutConfig.model_validate({"group_size": GROUP_SIZE, **rollout}))


def test_the_share_is_that_of_the_newest_answers_and_unknown_while_they_are_few() -> None:
    of, one = allocator(allocation="knapsack"), prompt(0)
    of.note(one, [1.0, 0.0, None, math.nan, 1.5, 0.9, 1.0, 0.0, 1.0])
    assert of.solve_rates == {"p0": "1010101"} and of.solve_rate("p0") is None
    of.note(one, [0.0])
    assert len(of.solve_rates["p0"]) == NUM_TRUSTED and of.solve_rate("p0") == 0.5
    of.note(one, [0.0] * (NUM_POOLED - 2))
    assert of.solve_rates == {"p0": "10" + "0" * (NUM_POOLED - 2)}
    of.note(one, [1.0] * (NUM_POOLED + 3) + [0.0])  # a visit of more: all of it, and nothing else
    assert of.solve_rate("p0") == (NUM_POOLED + 3) / (NUM_POOLED + 4)
    of.note(one, [None])
    assert len(of.solve_rates["p0"]) == NUM_POOLED + 4 and of.solve_rate("p1") is None


def test_nothing_is_kept_where_the_rule_asks_for_nothing() -> None:
    of = allocator()
    of.note(prompt(0), [1.0] * 20)
    assert of.solve_rates == {} and of.allocate([prompt(0)]) == [GROUP_SIZE]


def value_of_epochs(of: SampleAllocator, seed: int) -> float:
    """The mean value of an epoch of 128 prompts, whose true rates stay; most are near 0 or 1."""
    rng = np.random.default_rng(seed)
    rates, prompts = rng.beta(0.5, 0.5, size=128), [prompt(i) for i in range(128)]
    values = []
    for _ in range(8):
        counts = of.allocate(prompts)
        assert sum(counts) == GROUP_SIZE * len(prompts)
        values.append(sum(group_value(p, n) for p, n in zip(rates, counts, strict=True)))
        for one, p, n in zip(prompts, rates, counts, strict=True):
            of.note(one, (rng.uniform(size=n) < p).astype(float).tolist())
    return float(np.mean(values))


def test_samples_are_not_spent_worse_than_evenly_though_rates_are_only_estimated() -> None:
    """With the share of the last visit alone, of 2 answers perhaps, they are."""
    gains = [
        value_of_epochs(allocator(allocation="knapsack"), seed) - value_of_epochs(allocator(), seed)
        for seed in range(6)
    ]
    assert 0 < np.mean(gains) < 0.5  # the true rates would give 0.5 or so
