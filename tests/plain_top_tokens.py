"""Losses that look at several tokens of the vocabulary, once more: an answer, whole distributions, autograd.

Nothing of apo_megatron is used here, and nothing is cancelled or kept in logs that the formulas do not have
there. sg(x) of the papers is ``x.detach()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.plain_losses import ppo_loss

Settings = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answer of R tokens under three policies."""

    log_probs: Tensor  # [R, V], grad
    old: Tensor  # [R, V]
    reference: Tensor  # [R, V]
    targets: Tensor  # [R]
    advantage: float
    solve_rate: float = 0.0


def simko(answer: Answer, settings: Settings) -> Tensor:
    own, probs, old = settings["simko"], answer.log_probs.exp(), answer.old.exp()
    entropies = -(probs * answer.log_probs).sum(1).detach()
    bound = torch.quantile(entropies, own["entropy_quantile"])
    losses = []
    for p, q, entropy, y in zip(probs, old, entropies, answer.targets.tolist(), strict=True):
        ratio, a = p[y] / q[y], answer.advantage
        if entropy > bound and a > 0:
            top = p.topk(own["topk"]).indices.tolist()
            of_top = [ratio.detach() / (p[k] / q[k]).detach() * (p[k] / q[k]) for k in top]
            ratio = (1 - own["mix"]) * ratio + own["mix"] / own["topk"] * sum(of_top)
        if entropy > bound and a < 0 and y == int(p.argmax()):
            a = a * own["wrong_top1_factor"]
        losses.append(_clipped(ratio, a, settings))
    return torch.stack(losses)


def topk_forward_kl(answer: Answer, settings: Settings) -> Tensor:
    own = settings["topk_forward_kl"]
    weight = own["weight"] * ((1 - answer.solve_rate) ** 2 if own["solve_rate_weighting"] else 1.0)
    losses = []
    rows = zip(answer.log_probs, answer.old, answer.reference, answer.targets.tolist(), strict=True)
    for log_p, log_q, log_reference, y in rows:
        top = log_reference.topk(min(settings["apo_topk"], len(log_p))).indices
        kl = (log_reference[top].exp() * (log_reference[top] - log_p[top])).sum()
        ratio = (log_p[y] - log_q[y]).exp()
        losses.append(_clipped(ratio, answer.advantage, settings) + weight * kl)
    return torch.stack(losses)


TOP_TOKEN_LOSSES: dict[str, Callable[[Answer, Settings], Tensor]] = {
    "simko": simko,
    "topk_forward_kl": topk_forward_kl,
}


def _clipped(ratio: Tensor, a: float, settings: Settings) -> Tensor:
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    return ratio * 0 + ppo_loss(ratio, a, low, high, settings.get("dual_clip"))
