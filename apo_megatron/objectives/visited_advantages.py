"""Advantages that compare an answer with all earlier ones to its prompt, by statistics of each prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apo_megatron.objectives.advantages import MIN_SPREAD

# Of a prompt: how often it was drawn, mean and std of its rewards over all of these times.
Visits = tuple[int, float, float]


def dcpo_advantages(
    rewards: Tensor, prompt_ids: Sequence[str] | None, state: Mapping[str, Any] | None
) -> Tensor:
    """Smooth advantage standardisation of DCPO (arXiv 2509.02333), [P, G] -> [P, G]. [code]

    A_new standardises R in its group, A_all by mean and std over the j times that the prompt was drawn, with
    this one; 0 where that std is 0. Of A_new / j + (1 - 1/j) A_all and A_all / j + (1 - 1/j) A_new it is the
    one of smaller magnitude. The first time this is GRPO; later a group whose rewards do not differ has a
    signal if those of earlier times were others.
    """
    advantages = torch.zeros_like(rewards)
    for row, (now, visits) in enumerate(_visits(rewards, prompt_ids, state)[0]):
        if now is None or visits is None:
            continue
        count = visits[0]
        new, over_all = (_standardised(rewards[row], *statistics[1:]) for statistics in (now, visits))
        one = over_all / count + (1 - 1 / count) * new
        other = new / count + (1 - 1 / count) * over_all
        advantages[row] = torch.where(one.abs() < other.abs(), one, other)
    return advantages.nan_to_num(0.0)


def note_visits(
    rewards: Tensor, prompt_ids: Sequence[str] | None, state: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The statistics by prompt that the next step starts from; those of other prompts are taken over."""
    of_step = _visits(rewards, prompt_ids, state)[1]
    return {**(state or {}), **{name: list(visits) for name, visits in of_step.items()}}


def _visits(
    rewards: Tensor, prompt_ids: Sequence[str] | None, state: Mapping[str, Any] | None
) -> tuple[list[tuple[Visits | None, Visits | None]], dict[str, Visits]]:
    """Of each group its own statistics and those of its prompt with it; and of these prompts after the step.

    None for a group with fewer than two judged samples, which is not counted. A prompt that comes twice in a
    step was drawn twice.
    """
    found: list[tuple[Visits | None, Visits | None]] = []
    names = prompt_ids if prompt_ids is not None else [str(row) for row in range(len(rewards))]
    before = state or {}
    known: dict[str, Visits] = {
        name: (before[name][0], before[name][1], before[name][2]) for name in names if name in before
    }
    for name, row in zip(names, rewards.double(), strict=True):
        judged = row[~row.isnan()]
        if len(judged) < 2:
            found.append((None, None))
            continue
        is_mixed = float(judged.max() - judged.min()) > MIN_SPREAD
        now = (1, float(judged.mean()), float(judged.std()) if is_mixed else 0.0)
        known[name] = _merged(known[name], now) if name in known else now
        found.append((now, known[name]))
    return found, known


def _merged(before: Visits, now: Visits) -> Visits:
    """Every time counts alike, however many samples were drawn."""
    count, mean, std = before
    total = count + 1
    variance = (count * std**2 + now[2] ** 2 + count / total * (now[1] - mean) ** 2) / total
    return total, (count * mean + now[1]) / total, math.sqrt(variance)


def _standardised(rewards: Tensor, mean: float, std: float) -> Tensor:
    return (rewards - mean) / std if std > MIN_SPREAD else torch.zeros_like(rewards)
