"""The policy losses once more, from their papers: one token, plain numbers, derivatives by hand.

Nothing of apo_megatron is used here. With p = pi_theta(y) and q = pi_old(y), each gives the loss of a token
and d loss / d log p; bounds are closed, and at r = 1 nothing is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]
PlainLoss = Callable[[float, float, float, Settings], tuple[float, float]]


def vanilla(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
    return ppo(math.exp(log_p - log_q), a, low, high, settings["dual_clip"])


def gppo(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    r, low, high = math.exp(log_p - log_q), 1 - settings["clip_low"], 1 + settings["clip_high"]
    if a > 0 and r > high:
        return -a * high, -a * high * settings["gppo"]["right_gradient"]
    if a < 0 and r < low:
        return -a * low, -a * low * settings["gppo"]["wrong_gradient"]
    return ppo(r, a, low, high, settings["dual_clip"])


def dcpo_clip(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    own, q = settings["dcpo"], math.exp(log_q)
    # The roots of r (1 - r) q = clip_low nearest to 1, and of r (r - 1) q = clip_high.
    low = 0.5 + math.sqrt(max(0.25 - own["clip_low"] / q, 0.0)) if q > 0 else 0.5
    high = 0.5 + math.sqrt(0.25 + own["clip_high"] / q) if q > 0 else math.inf
    return ppo(math.exp(log_p - log_q), a, low, min(high, own["max_ratio"]), settings["dual_clip"])


def sapo(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    r = math.exp(min(log_p - log_q, 20.0))
    tau = settings["sapo"]["wrong_temperature" if a < 0 else "right_temperature"]
    half = math.tanh(tau * (r - 1) / 2)  # 2 sigmoid(x) - 1 = tanh(x / 2)
    return -a * 2 / tau * (1 + half), -a * (1 - half**2) * r


def cispo(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    own = settings["cispo"]
    return _reinforce(log_p, log_q, a, own["clip_low"], own["clip_high"])


def dispo(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    own, sign = settings["dispo"], "wrong" if a < 0 else "right"
    return _reinforce(log_p, log_q, a, own[f"{sign}_clip_low"], own[f"{sign}_clip_high"])


def dppo_tv(log_p: float, log_q: float, a: float, settings: Settings) -> tuple[float, float]:
    own, moved = settings["dppo"], math.exp(log_p) - math.exp(log_q)
    if (a > 0 and moved > own["max_increase"]) or (a < 0 and -moved > own["max_decrease"]):
        return 0.0, 0.0
    weight = min(math.exp(log_p - log_q), own["max_weight"])
    return -weight * a * log_p, -weight * a


PLAIN_LOSSES: dict[str, PlainLoss] = {
    "vanilla": vanilla,
    "gppo": gppo,
    "dcpo_clip": dcpo_clip,
    "sapo": sapo,
    "cispo": cispo,
    "dispo": dispo,
    "dppo_tv": dppo_tv,
}


def plain_loss(
    name: str, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, settings: Settings
) -> Tensor:
    """The loss of each token, [T], with the gradient that the functions above state for ``log_probs``."""
    rows = zip(log_probs.tolist(), old_log_probs.tolist(), advantages.tolist(), strict=True)
    pairs = [PLAIN_LOSSES[name](p, q, a, settings) for p, q, a in rows]
    value, slope = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).to(log_probs.dtype).unbind(1)
    return value + slope * (log_probs - log_probs.detach())


def ppo(r: float, a: float, low: float, high: float, dual: float | None) -> tuple[float, float]:
    loss = ppo_loss(r, a, low, high, dual)
    return loss, -a * r if loss == -a * r else 0.0


def ppo_loss(r: Any, a: float, low: float, high: float, dual: float | None) -> Any:
    """PPO as a maximum of two, then the dual clip as a minimum; ``r`` a number, or a tensor for autograd."""
    loss = max(-a * r, -a * min(max(r, low), high))
    return -a * dual if a < 0 and dual is not None and loss > -a * dual else loss


def _reinforce(log_p: float, log_q: float, a: float, low: float, high: float) -> tuple[float, float]:
    weight = min(max(math.exp(log_p - log_q), 1 - low), 1 + high)
    return -weight * a * log_p, -weight * a
