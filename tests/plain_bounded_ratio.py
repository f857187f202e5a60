"""GBPO once more, from its paper: one token, plain numbers, the derivative by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def gbpo(log_p: float, log_q: float, a: float, z: float, own: dict[str, Any]) -> tuple[float, float]:
    """The loss of a token and d loss / d log p."""
    low, high = 1 - own["clip_low"], 1 + own["clip_high"]
    scaled = z / own["temperature"]  # exp must not overflow
    share = 1 / (1 + math.exp(-scaled)) if scaled > 0 else 1 - 1 / (1 + math.exp(scaled))
    target = low + (high - low) * share
    log_ratio = log_p - log_q
    r = math.exp(min(max(log_ratio, -20.0), 20.0))
    if abs(r - target) < 1e-12:  # at the target, but for rounding
        return 0.0, 0.0
    sign = 1.0 if r > target else -1.0
    return abs(a) * abs(r - target), abs(a) * sign * r * (abs(log_ratio) <= 20)


def plain_gbpo(log_probs: Tensor, old: Tensor, advantages: Tensor, z: Tensor, own: dict[str, Any]) -> Tensor:
    """The loss of each token, [T], with the gradient stated above for ``log_probs``."""
    rows = zip(log_probs.tolist(), old.tolist(), advantages.tolist(), z.tolist(), strict=True)
    pairs = [gbpo(*row, own) for row in rows]
    value, slope = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).to(log_probs.dtype).unbind(1)
    return value + slope * (log_probs - log_probs.detach())
