"""How many samples each prompt of a round gets; ``rollout/sampler.py`` asks.

A new one: docs/extending.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apo_megatron.config.rollout import RolloutConfig

# Share of right answers among the newest of a prompt (``rollout/allocation.py``); None: too few are known.
SolveRates = Sequence[float | None]


@dataclass(frozen=True)
class SampleAllocationSpec:
    """A rule and what must be known for it; what is not declared is not kept."""

    function: Callable[[SolveRates, RolloutConfig], list[int]]  # samples of each prompt of a round
    needs_solve_rates: bool = False


def knapsack(solve_rates: SolveRates, cfg: RolloutConfig) -> list[int]:
    """Knapsack RL (arXiv 2509.25849): the samples of a round go where they are likeliest to teach. [code]

    Experimental: without the authors' fallback, and for them a prompt left at ``min_samples`` is worth 0,
    here what ``group_value`` says. Maximises the sum of it over the prompts with a known solve rate, each
    with ``min_samples`` to ``max_samples``, group_size on average; a prompt without one gets group_size. What
    nobody gains by goes to those that have the fewest, in their order.
    """
    known = [i for i, p in enumerate(solve_rates) if p is not None]
    rates = [p for p in solve_rates if p is not None]
    own = cfg.knapsack
    chosen = best_allocation(rates, len(rates) * cfg.group_size, own.min_samples, own.max_samples)
    counts = [cfg.group_size] * len(solve_rates)
    for i, count in zip(known, chosen, strict=True):
        counts[i] = count
    return counts


def best_allocation(rates: Sequence[float], budget: int, smallest: int, largest: int) -> list[int]:
    """Counts in [smallest, largest] that add up to ``budget`` and maximise the sum of ``group_value``.

    Step by step to whoever gains most. That is exact for this sum (not for the authors'): the gain of one
    more sample, w (p^n q + q^n p) with q = 1 - p and a weight w >= 0, never grows with n. Of equal gains that
    of the smallest count comes first, then that of the first prompt.
    """
    assert len(rates) * smallest <= budget <= len(rates) * largest, "a rule of the configuration sees to it"
    counts = [smallest] * len(rates)
    queue = [(-_gain(p, smallest), smallest, i) for i, p in enumerate(rates)]
    heapq.heapify(queue)
    for _ in range(budget - len(rates) * smallest):
        _, count, i = heapq.heappop(queue)
        counts[i] = count + 1
        if counts[i] < largest:
            heapq.heappush(queue, (-_gain(rates[i], counts[i]), counts[i], i))
    return counts


def group_value(solve_rate: float, num_samples: int) -> float:
    """(1 - p^n - (1 - p)^n) p (1 - p)^2: the chance of right and wrong answers, by what they teach."""
    p, n = solve_rate, num_samples
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def _gain(p: float, num_samples: int) -> float:
    """group_value(p, n + 1) - group_value(p, n), without the rounding of the difference."""
    return (p**num_samples * (1 - p) + (1 - p) ** num_samples * p) * p * (1 - p) ** 2


def _uniform(solve_rates: SolveRates, cfg: RolloutConfig) -> list[int]:
    return [cfg.group_size] * len(solve_rates)


SAMPLE_ALLOCATIONS: dict[str, SampleAllocationSpec] = {
    "uniform": SampleAllocationSpec(_uniform),
    "knapsack": SampleAllocationSpec(knapsack, needs_solve_rates=True),
}
