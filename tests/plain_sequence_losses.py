"""Losses and corrections over whole answers once more, from their papers: one answer, plain numbers.

As ``plain_losses.py``, with lists: log p and log q of all tokens of an answer, a loss and d loss / d log p of
each. Logs of ratios are held within +-20, outside of which there is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.plain_losses import Settings, ppo

Numbers = list[float]
PlainSequenceLoss = Callable[[Numbers, Numbers, float, Settings], list[tuple[float, float]]]


def gspo(log_p: Numbers, log_q: Numbers, a: float, settings: Settings) -> list[tuple[float, float]]:
    own, s = settings["gspo"], math.exp(sum(_log_ratios(log_p, log_q)) / len(log_p))
    return [ppo(s, a, 1 - own["clip_low"], 1 + own["clip_high"], settings["dual_clip"]) for _ in log_p]


def ctpo(log_p: Numbers, log_q: Numbers, a: float, settings: Settings) -> list[tuple[float, float]]:
    own, log_w = settings["ctpo"], 0.0
    pairs = []
    for t, log_r in enumerate(_log_ratios(log_p, log_q), start=1):
        log_w += log_r
        found, scale = log_w / t if own["geometric_mean"] else log_w, t ** own["power"]
        low, high, dual = (math.exp(x * scale) for x in (-own["low"], own["high"], own["dual"]))
        loss, slope = ppo(math.exp(_held(found)), a, low, high, dual)
        pairs.append((loss, slope if abs(found) <= 20 else 0.0))
    return pairs


def vespo(log_p: Numbers, log_q: Numbers, a: float, settings: Settings) -> list[tuple[float, float]]:
    own, sign = settings["vespo"], "wrong" if a < 0 else "right"
    w = math.exp(_held(sum(_log_ratios(log_p, log_q))))
    phi = w ** own[f"{sign}_power"] * math.exp(own[f"{sign}_decay"] * (1 - w))
    return [(-phi * a * log, -phi * a) for log in log_p]


PLAIN_SEQUENCE_LOSSES: dict[str, PlainSequenceLoss] = {"gspo": gspo, "ctpo": ctpo, "vespo": vespo}


def plain_sequence_loss(
    name: str, log_probs: Tensor, old_log_probs: Tensor, advantage: float, settings: Settings
) -> Tensor:
    """The loss of each token of one answer, [T], with the gradient that the functions above state."""
    pairs = PLAIN_SEQUENCE_LOSSES[name](log_probs.tolist(), old_log_probs.tolist(), advantage, settings)
    value, slope = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).to(log_probs.dtype).unbind(1)
    return value + slope * (log_probs - log_probs.detach())


def plain_weights(
    log_p: Numbers, log_q: Numbers, log_rollout: Numbers, a: float, settings: dict[str, Any]
) -> Numbers:
    """What the losses of one answer are multiplied by."""
    ratios = [math.exp(log_rho) for log_rho in _log_ratios(log_q, log_rollout)]
    correction = settings.get("mismatch_correction", "none")
    weights = [1.0] * len(log_p)
    if correction == "seq_mask_tis":
        mean = math.exp(sum(_log_ratios(log_q, log_rollout)) / len(log_p))
        is_kept = settings["seq_mask_low"] <= mean <= settings["seq_mask_high"]
        weights = ratios if is_kept else [0.0] * len(log_p)
    elif correction == "tis":
        weights = [min(ratio, settings["tis_cap"]) for ratio in ratios]
    threshold = settings.get("off_policy_mask")
    if threshold is not None and a < 0 and sum(_log_ratios(log_rollout, log_p)) / len(log_p) > threshold:
        weights = [0.0] * len(log_p)
    return weights


def _log_ratios(log_p: Numbers, log_q: Numbers) -> Numbers:
    return [_held(p - q) for p, q in zip(log_p, log_q, strict=True)]


def _held(log_ratio: float) -> float:
    return min(max(log_ratio, -20.0), 20.0)
