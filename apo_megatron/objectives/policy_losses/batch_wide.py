"""Losses that must know the whole mini-batch: covariances, balance of right and wrong, sample size.

Each has a ``BatchStatistics``, computed before the update under the weights that it starts from, and then the
same for every micro-batch and rank; a scalar is repeated for each token. All tensors are [T].
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.policy_losses import BAPOConfig
from apo_megatron.objectives.interface import (
    BatchStatistics,
    LossInputs,
    LossOutputs,
    MiniBatchInputs,
    TokenMetric,
)
from apo_megatron.objectives.kl import kl_k3
from apo_megatron.objectives.policy_losses.clipped import clipped_loss
from apo_megatron.objectives.ratios import importance_ratio, log_importance_ratio
from apo_megatron.objectives.selection import draw, largest, num_chosen
from apo_megatron.objectives.surrogates import clipped_tokens


def clip_cov(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """Clip-Cov (arXiv 2505.22617): PPO in which some tokens of high covariance have no loss. [code]

    c = (A - mean A) (log pi - mean log pi), means over all tokens of the mini-batch. Of the tokens that PPO
    does not clip and whose c lies between the section's bounds, ``share`` of all tokens are drawn, at least
    one; their loss is 0, and they stay in the denominators. The draw is the same in every layout and after a
    resume. Share 0 is PPO. The authors take means and share of each micro-batch.
    """
    own = cfg.clip_cov
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    outputs = clipped_loss(ratio, inputs, own.clip_low, own.clip_high, cfg.dual_clip)
    is_drawn = inputs.statistics["is_chosen"] > 0
    loss = torch.where(is_drawn, 0.0, outputs.loss)
    return LossOutputs(loss, {**outputs.metrics, "covariance_share": TokenMetric(is_drawn)})


def kl_cov(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """KL-Cov (arXiv 2505.22617): -A r, plus coeff |log r| on the tokens of the largest covariance. [code]

    c as in Clip-Cov; ``share`` of all tokens of the mini-batch are held, at least one. No clip. At r = 1
    exactly |log r| has no gradient; where only rounding separates the two passes, its sign is theirs.
    """
    log_ratio = log_importance_ratio(inputs.log_probs, inputs.old_log_probs)
    is_held = inputs.statistics["is_chosen"] > 0
    loss = -inputs.advantages * log_ratio.exp()
    loss = loss + torch.where(is_held, cfg.kl_cov.coeff * log_ratio.abs(), 0.0)
    return LossOutputs(loss, {"covariance_share": TokenMetric(is_held)})


def bapo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """BAPO (arXiv 2510.18927): PPO between bounds that each mini-batch finds for itself. [code]

    From their starts: while P / N < target, P the sum of min(r, high) A over A >= 0 and N that of
    max(r, low) |A| over A < 0, raise low by its step until its maximum; then high until its own. N = 0
    raises nothing. Target 0 is PPO between the first bounds. The authors add a ``dual_clip`` of 3.
    """
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    low, high = inputs.statistics["low"], inputs.statistics["high"]
    outputs = clipped_loss(ratio, inputs, 1 - low, high - 1, cfg.dual_clip)
    return LossOutputs(
        outputs.loss, {**outputs.metrics, "bapo_low": TokenMetric(low), "bapo_high": TokenMetric(high)}
    )


def p3o(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """P3O (arXiv 2605.12380): loss = -sg(min(r, ess)) A log pi + (1 - ess) k3(pi || pi_old). [code]

    ess = (sum r)^2 / (N sum r^2) over the N tokens of the mini-batch, in (0, 1]: 1 where all r are equal, as
    in the first update on fresh samples. Nothing to set; the authors' KL to the reference is ``use_kl_loss``.
    Their N tokens are those of one micro-batch on all ranks.
    """
    ess = inputs.statistics["ess"]
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs).detach()
    weights = torch.minimum(ratio, ess)
    distance = kl_k3(inputs.log_probs, inputs.old_log_probs)
    loss = -weights * inputs.advantages * inputs.log_probs + (1 - ess) * distance
    return LossOutputs(loss, {"ess": TokenMetric(ess)})


def _covariances(inputs: MiniBatchInputs) -> tuple[Tensor, int]:
    """c of each token, and how many tokens the mini-batch has."""
    num_here = torch.full((), len(inputs.log_probs), dtype=torch.float64)
    total = inputs.sum(torch.stack([num_here, inputs.advantages.sum(), inputs.log_probs.sum()]))
    mean_advantage, mean_log_prob = total[1] / total[0], total[2] / total[0]
    return (inputs.advantages - mean_advantage) * (inputs.log_probs - mean_log_prob), int(total[0])


def _clip_cov_tokens(inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    own = cfg.clip_cov
    covariances, num_tokens = _covariances(inputs)
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    clipped = clipped_tokens(ratio, inputs.advantages, own.clip_low, own.clip_high)
    is_candidate = (covariances > own.covariance_low) & (covariances < own.covariance_high)
    is_candidate &= ~(clipped.low | clipped.high)
    return {"is_chosen": draw(is_candidate, num_chosen(own.share, num_tokens), inputs)}


def _kl_cov_tokens(inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    covariances, num_tokens = _covariances(inputs)
    return {"is_chosen": largest(covariances, num_chosen(cfg.kl_cov.share, num_tokens), inputs)}


def _bapo_bounds(inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    own, (low, high) = cfg.bapo, (cfg.bapo.low_start, cfg.bapo.high_start)
    while _is_below_target(inputs, low, high, own) and low < own.low_max:
        low = min(low + own.low_step, own.low_max)
    while _is_below_target(inputs, low, high, own) and high < own.high_max:
        high = min(high + own.high_step, own.high_max)
    like = inputs.log_probs
    return {"low": torch.full_like(like, low), "high": torch.full_like(like, high)}


def _is_below_target(inputs: MiniBatchInputs, low: float, high: float, cfg: BAPOConfig) -> bool:
    ratio, advantages = importance_ratio(inputs.log_probs, inputs.old_log_probs), inputs.advantages
    right = (ratio.clamp(max=high) * advantages)[advantages >= 0].sum()
    wrong = (ratio.clamp(min=low) * -advantages)[advantages < 0].sum()
    total_right, total_wrong = inputs.sum(torch.stack([right, wrong])).tolist()
    return bool(total_right < cfg.target * total_wrong)


def _sample_size(inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    count, total, squares = inputs.sum(
        torch.stack([torch.ones_like(ratio).sum(), ratio.sum(), ratio.square().sum()])
    )
    return {"ess": (total.square() / (count * squares)).clamp(max=1.0).expand_as(ratio)}


CLIP_COV_TOKENS = BatchStatistics(("is_chosen",), _clip_cov_tokens)
KL_COV_TOKENS = BatchStatistics(("is_chosen",), _kl_cov_tokens)
BAPO_BOUNDS = BatchStatistics(("low", "high"), _bapo_bounds)
SAMPLE_SIZE = BatchStatistics(("ess",), _sample_size)
