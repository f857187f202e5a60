"""The losses that look at a whole mini-batch once more, from their papers: loops, and autograd through
the definition itself.

Nothing of apo_megatron is used here. A mini-batch is a list of answers; each loss gives a list of losses for
each answer, and a number that is added to the mini-batch's loss as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.plain_losses import ppo_loss

Settings = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    log_probs: Tensor  # [T_i], with gradient
    old_log_probs: Tensor  # [T_i]
    advantage: float
    group: int = 0
    seed: int = 0

    def keys(self) -> list[int]:
        """What is drawn for its tokens."""
        return np.random.default_rng(self.seed).integers(2**63, size=len(self.log_probs)).tolist()

    def ratios(self) -> list[float]:
        return [math.exp(log_ratio) for log_ratio in (self.log_probs - self.old_log_probs).tolist()]


Place = tuple[int, int]  # answer, token
PlainBatchLoss = Callable[[list[Answer], Settings], tuple[list[list[Tensor]], Tensor | float]]


def clip_cov(answers: list[Answer], settings: Settings) -> tuple[list[list[Tensor]], float]:
    own = settings["clip_cov"]
    low, high = 1 - own["clip_low"], 1 + own["clip_high"]
    keys = [answer.keys() for answer in answers]
    candidates = []
    for (i, t), covariance in _covariances(answers).items():
        r, a = answers[i].ratios()[t], answers[i].advantage
        is_clipped = (a > 0 and r > high) or (a < 0 and r < low)
        if own["covariance_low"] < covariance < own["covariance_high"] and not is_clipped:
            candidates.append((keys[i][t], (i, t)))
    drawn = {place for _, place in sorted(candidates)[: _count(own["share"], answers)]}
    dual = settings.get("dual_clip")
    return [
        [
            answer.log_probs[t] * 0 if (i, t) in drawn else _ppo(answer, t, low, high, dual)
            for t in range(len(answer.log_probs))
        ]
        for i, answer in enumerate(answers)
    ], 0.0


def kl_cov(answers: list[Answer], settings: Settings) -> tuple[list[list[Tensor]], float]:
    own = settings["kl_cov"]
    keys = [answer.keys() for answer in answers]
    ranked = sorted(_covariances(answers).items(), key=lambda item: (-item[1], keys[item[0][0]][item[0][1]]))
    held = {place for place, _ in ranked[: _count(own["share"], answers)]}

    def loss(i: int, t: int) -> Tensor:
        log_ratio = answers[i].log_probs[t] - answers[i].old_log_probs[t]
        free = -answers[i].advantage * log_ratio.exp()
        return free + own["coeff"] * log_ratio.abs() if (i, t) in held else free

    return [[loss(i, t) for t in range(len(a.log_probs))] for i, a in enumerate(answers)], 0.0


def bapo(answers: list[Answer], settings: Settings) -> tuple[list[list[Tensor]], float]:
    low, high = bapo_bounds(answers, settings["bapo"])
    dual = settings.get("dual_clip")
    return [[_ppo(a, t, low, high, dual) for t in range(len(a.log_probs))] for a in answers], 0.0


def bapo_bounds(answers: list[Answer], own: Settings) -> tuple[float, float]:
    low, high = own["low_start"], own["high_start"]
    while True:
        right = wrong = 0.0
        for answer in answers:
            a = answer.advantage
            for r in answer.ratios():
                if a >= 0:
                    right += min(r, high) * a
                else:
                    wrong += max(r, low) * -a
        if wrong == 0 or right / wrong >= own["target"]:
            return low, high
        if low < own["low_max"]:
            low = min(low + own["low_step"], own["low_max"])
        elif high < own["high_max"]:
            high = min(high + own["high_step"], own["high_max"])
        else:
            return low, high


def p3o(answers: list[Answer], settings: Settings) -> tuple[list[list[Tensor]], float]:
    ratios = [r for answer in answers for r in answer.ratios()]
    ess = sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios))

    def loss(answer: Answer, t: int) -> Tensor:
        p, old = answer.log_probs[t], answer.old_log_probs[t]
        weight = min(answer.ratios()[t], ess)
        return -weight * answer.advantage * p + (1 - ess) * ((old - p).exp() - (old - p) - 1)

    return [[loss(answer, t) for t in range(len(answer.log_probs))] for answer in answers], 0.0


def dmpo(answers: list[Answer], settings: Settings) -> tuple[list[list[Tensor]], Tensor]:
    """The distance as it is defined, of whole groups; autograd goes through its softmax."""
    own = settings["dmpo"]
    distances = []
    for group in sorted({answer.group for answer in answers}):
        members = [answer for answer in answers if answer.group == group]
        wanted = [answer.advantage / own["temperature"] for answer in members]
        p = torch.tensor(wanted, dtype=members[0].log_probs.dtype).softmax(0)
        q = torch.stack([answer.log_probs.mean() for answer in members]).softmax(0)
        distances.append((p - q) ** 2)
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    dual = settings.get("dual_clip")
    losses = [[_ppo(a, t, low, high, dual) for t in range(len(a.log_probs))] for a in answers]
    return losses, own["coeff"] * torch.cat(distances).mean()


PLAIN_BATCH_LOSSES: dict[str, PlainBatchLoss] = {
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "bapo": bapo,
    "p3o": p3o,
    "dmpo": dmpo,
}


def _covariances(answers: list[Answer]) -> dict[Place, float]:
    tokens = {(i, t): p for i, a in enumerate(answers) for t, p in enumerate(a.log_probs.tolist())}
    mean_log_prob = sum(tokens.values()) / len(tokens)
    mean_advantage = sum(answers[i].advantage for i, _ in tokens) / len(tokens)
    return {
        (i, t): (answers[i].advantage - mean_advantage) * (p - mean_log_prob) for (i, t), p in tokens.items()
    }


def _count(share: float, answers: list[Answer]) -> int:
    num_tokens = sum(len(answer.log_probs) for answer in answers)
    return max(1, int(share * num_tokens)) if share > 0 else 0


def _ppo(answer: Answer, t: int, low: float, high: float, dual: float | None) -> Tensor:
    ratio = (answer.log_probs[t] - answer.old_log_probs[t]).exp()
    return ratio * 0 + ppo_loss(ratio, answer.advantage, low, high, dual)
