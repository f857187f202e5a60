"""Which samples of a step are trained on, once their advantages are known; ``rollout/filtering.py`` asks.

A filter looks at the step as a whole: all its samples that have an advantage, of every rank. What it leaves
out is in no sum and no denominator, as if it had not been drawn; its reward counted in the advantages of its
group.

A new one: docs/extending.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_megatron.config.rollout import RolloutConfig

_ROUNDING = 1e-9  # 0.7 * 10 is a little more than 7, and equal variances may differ by so much


@dataclass(frozen=True)
class FilterInputs:
    """What a filter may look at."""

    advantages: Tensor  # [N] float64, in a random order: of equal ones a filter may take the first
    progress: float  # 0 in the first step of the run, 1 in the last


SampleFilter = Callable[[FilterInputs, RolloutConfig], Tensor]  # -> [N] bool, which are kept


def d3s(inputs: FilterInputs, cfg: RolloutConfig) -> Tensor:
    """D3S (arXiv 2509.22115), its choice of samples: those whose advantages vary most. [second-hand]

    Experimental: no code of the authors is known. Left out are its choice within each group, which comes
    first, and that of tokens by |A| times entropy, which comes last. The share that is kept grows evenly from
    ``first_share`` to 1 in the last step; two at least.
    """
    share = cfg.d3s.first_share + (1 - cfg.d3s.first_share) * inputs.progress
    num_samples = len(inputs.advantages)
    num_kept = max(2, math.ceil(share * num_samples - _ROUNDING))
    return most_varied(inputs.advantages, min(num_kept, num_samples))


def most_varied(values: Tensor, num_kept: int) -> Tensor:
    """The ``num_kept`` of ``values`` with the largest variance, [N] -> [N] bool.

    They are some of the smallest and the rest of the largest: the variance is convex in each value, so one
    from the middle can always go to a side. All splits are compared; of equal ones the most even is taken. Of
    equal values the first are the smaller ones.
    """
    ordered, places = (values - values.mean() if len(values) else values).sort(stable=True)
    num_low = torch.arange(num_kept + 1, device=values.device)
    total, squares = (_sums_of_ends(x, num_low, num_kept) for x in (ordered, ordered.square()))
    variance = squares / max(1, num_kept) - (total / max(1, num_kept)).square()
    is_best = variance >= variance.max() * (1 - _ROUNDING)
    unevenness = torch.where(is_best, (2 * num_low - num_kept).abs(), 2 * num_kept + 1)
    best = int(unevenness.argmin())
    is_kept = torch.zeros_like(values, dtype=torch.bool)
    is_kept[places[:best]] = True
    is_kept[places[len(values) - (num_kept - best) :]] = True
    return is_kept


def _sums_of_ends(ordered: Tensor, num_low: Tensor, num_kept: int) -> Tensor:
    """Of the first ``num_low`` and the last num_kept - num_low, [num_kept + 1]."""
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    return sums[num_low] + sums[-1] - sums[len(ordered) - (num_kept - num_low)]


def _all(inputs: FilterInputs, cfg: RolloutConfig) -> Tensor:
    return torch.ones_like(inputs.advantages, dtype=torch.bool)


SAMPLE_FILTERS: dict[str, SampleFilter] = {"none": _all, "d3s": d3s}
