"""Advantages from the risk of bundles of prompts, with quantiles that are tracked from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from apo_megatron.config.advantages import RiskPOConfig
from apo_megatron.objectives.advantages import mixed_groups

_EPS = 1e-6  # beside a std that is divided by
_MIN_STD = 1e-3  # the authors': a prompt of smaller std is not divided by it


def riskpo_advantages(rewards: Tensor, cfg: RiskPOConfig, tracked: Mapping[str, float] | None) -> Tensor:
    """RiskPO (arXiv 2510.00911), [P, G] -> [P, G]: never positive, 0 at the upper quantile and above. [code]

    Experimental: the authors' scripts disagree (docs/objective.md). ``bundle_size`` prompts that follow each
    other in the step are a bundle, their g-th answers together one attempt, whose score s is the sum of its
    rewards. With quantiles q_lo and q_hi of s at the levels l and u, and w = ``cvar_weight``,

        a = (w a2 + a1) / (w + 1),  a1 = (clamp(s, q_lo, q_hi) - q_hi) / (u - l),  a2 = -max(0, q_lo - s) / l

    over the std of the bundle's scores, and A = a over the std of the prompt's rewards (1 where they do not
    differ). An attempt with an answer that was not judged is left out; a bundle whose scores do not differ
    gets 0, where dividing by its std would give any number.
    """
    quantiles = tracked or quantiles_of(rewards, cfg)
    if not quantiles:
        return torch.zeros_like(rewards)
    low, high, lower, upper = cfg.low_level, cfg.high_level, quantiles["low"], quantiles["high"]
    scores = attempt_scores(rewards, cfg.bundle_size)
    between = (scores.clamp(lower, max(lower, upper)) - max(lower, upper)) / (high - low)
    below = -(lower - scores).clamp(min=0) / low
    risk = (cfg.cvar_weight * below + between) / (cfg.cvar_weight + 1)
    risk = torch.where(mixed_groups(scores).unsqueeze(1), risk / (_std(scores) + _EPS), 0.0)
    own = _std(rewards)
    shared = risk.nan_to_num(0.0).repeat_interleave(cfg.bundle_size, dim=0)
    return shared / torch.where(own > _MIN_STD, own, 1.0)


def track_quantiles(
    rewards: Tensor, cfg: RiskPOConfig, tracked: Mapping[str, float] | None
) -> dict[str, float]:
    """What the next step starts from: q + ``tracking_rate`` (level - share of the scores below q).

    Before there is any q, the quantiles of this step. A step without a whole attempt changes nothing.
    """
    scores = _judged(attempt_scores(rewards, cfg.bundle_size))
    if not tracked or not len(scores):
        return dict(tracked or quantiles_of(rewards, cfg))
    levels = {"low": cfg.low_level, "high": cfg.high_level}
    share_below = {name: float((scores < tracked[name]).double().mean()) for name in levels}
    return {name: tracked[name] + cfg.tracking_rate * (levels[name] - share_below[name]) for name in levels}


def quantiles_of(rewards: Tensor, cfg: RiskPOConfig) -> dict[str, float]:
    """The two quantiles of the scores of a step; {} where there is no whole attempt."""
    scores = _judged(attempt_scores(rewards, cfg.bundle_size))
    if not len(scores):
        return {}
    return {
        "low": float(scores.quantile(cfg.low_level)),
        "high": float(scores.quantile(cfg.high_level)),
    }


def attempt_scores(rewards: Tensor, bundle_size: int) -> Tensor:
    """Sums over the prompts of each bundle, [P, G] -> [P / bundle_size, G]; NaN where one was not judged."""
    num_prompts, group_size = rewards.shape
    assert num_prompts % bundle_size == 0, "a rule of the configuration wants whole bundles"
    return rewards.reshape(-1, bundle_size, group_size).sum(dim=1)


def _std(values: Tensor) -> Tensor:
    """Unbiased, of those in each row that are not NaN: [P, G] -> [P, 1]; 0 of fewer than two."""
    is_judged = ~values.isnan()
    num_judged = is_judged.sum(dim=1, keepdim=True)
    mean = values.nansum(dim=1, keepdim=True) / num_judged.clamp(min=1)
    squares = torch.where(is_judged, values - mean, 0.0).square().sum(dim=1, keepdim=True)
    return (squares / (num_judged - 1).clamp(min=1)).sqrt()


def _judged(scores: Tensor) -> Tensor:
    return scores[~scores.isnan()].double()
