"""How many samples each prompt gets: every allocation of small budgets, compared in exact numbers."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.sampling import SampleAllocationName
from apo_megatron.objectives.sample_allocations import (
    SAMPLE_ALLOCATIONS,
    best_allocation,
    group_value,
    knapsack,
)
from apo_megatron.rollout.allocation import SampleAllocator
from apo_megatron.types import Prompt

METHODS = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def plain_value(p: Fraction, n: int) -> Fraction:
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


@pytest.mark.parametrize("seed", range(8))
def test_no_other_allocation_is_worth_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = [Fraction(int(right), 8) for right in rng.integers(0, 9, 4)]
    smallest, largest = (1, 6) if seed % 2 else (2, 5)
    for budget in range(4 * smallest, 4 * largest + 1):
        found = best_allocation([float(p) for p in rates], budget, smallest, largest)
        assert sum(found) == budget and all(smallest <= n <= largest for n in found)
        best = max(
            sum(plain_value(p, n) for p, n in zip(rates, counts, strict=True))
            for counts in product(range(smallest, largest + 1), repeat=4)
            if sum(counts) == budget
        )
        assert sum(plain_value(p, n) for p, n in zip(rates, found, strict=True)) == best


def test_the_gain_of_one_more_sample_falls() -> None:
    """Which is why sample by sample is exact."""
    for p in (Fraction(i, 20) for i in range(21)):
        gains = [plain_value(p, n + 1) - plain_value(p, n) for n in range(1, 40)]
        assert all(later <= earlier for earlier, later in zip(gains, gains[1:], strict=False))
        assert group_value(float(p), 7) == pytest.approx(float(plain_value(p, 7)), rel=1e-13, abs=1e-17)


def test_a_third_of_right_answers_is_worth_most_where_groups_are_large() -> None:
    values = [group_value(i / 300, 1000) for i in range(301)]
    assert values.index(max(values)) == 100


@pytest.mark.parametrize(
    ("rates", "budget", "expected"),
    [
        ([0.5, 0.0, 1.0, 0.5], 16, [6, 2, 2, 6]),
        ([0.0, 1.0, 0.0], 10, [4, 3, 3]),  # nobody gains: evenly, the first ones first
        ([0.5, 0.0], 14, [10, 4]),  # the others have all they may get
        ([0.5, 0.5], 9, [5, 4]),
        ([], 0, []),
    ],
)
def test_ties_and_bounds(rates: list[float], budget: int, expected: list[int]) -> None:
    assert best_allocation(rates, budget, 2, 10) == expected


def test_prompts_that_were_never_drawn_get_the_average() -> None:
    cfg = RolloutConfig.model_validate(
        {"group_size": 4, "allocation": "knapsack", "knapsack": {"min_samples": 2, "max_samples": 20}}
    )
    assert knapsack([None, None], cfg) == [4, 4]
    assert knapsack([None, 0.5, 0.0, None], cfg) == [4, 6, 2, 4]
    assert SAMPLE_ALLOCATIONS["uniform"].function([0.5, None], cfg) == [4, 4]


@pytest.mark.parametrize(("allocation", "kept"), [("uniform", {}), ("knapsack", {"a": "0100", "b": "10"})])
def test_answers_are_kept_where_the_rule_needs_them(allocation: str, kept: dict[str, str]) -> None:
    allocator = SampleAllocator(RolloutConfig.model_validate({"allocation": allocation}))
    allocator.go_on_from({"a": "0100"})
    for name, rewards in (("b", [1.0, 0.0, None, math.nan]), ("c", [None])):
        allocator.note(Prompt(name, "", np.zeros(0, np.int32)), rewards)
    assert allocator.solve_rates == kept


def test_what_a_configuration_may_name_is_what_is_registered_and_described() -> None:
    assert get_args(SampleAllocationName) == tuple(SAMPLE_ALLOCATIONS)
    section = METHODS.read_text().split("\n## Samples\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `allocation: (\w+)` \|", section, re.MULTILINE)) == set(SAMPLE_ALLOCATIONS)
    text = knapsack.__doc__ or ""
    assert "arXiv" in text and "[code]" in text and "Experimental" in text
