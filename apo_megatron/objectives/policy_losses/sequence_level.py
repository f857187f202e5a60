"""Losses of a weight that a token shares with others of its answer: all of them, or those before it.

All tensors are [T]. Sums and means go over the trained tokens of an answer, log r of each held within +-20.
At r = 1 everywhere the gradient of each loss is -A d log pi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs, TokenMetric
from apo_megatron.objectives.policy_losses.clipped import clipped_loss
from apo_megatron.objectives.ratios import MAX_LOG_RATIO, log_importance_ratio
from apo_megatron.objectives.sequences import (
    WholeSequences,
    position_in_sequence,
    prefix_sum,
    sequence_mean,
    sequence_sum,
)


def gspo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """GSPO (arXiv 2507.18071), its token form: PPO's clip on s = exp(mean of log r over the answer). [code]

    s_t = sg(s) pi(y) / sg(pi(y)): the value of s, the gradient of the token itself. The geometric mean moves
    little, so the bounds are hundreds of times narrower than PPO's. Answers of one token are PPO.
    """
    log_ratio, sequences = _log_ratio(inputs)
    ratio = _with_own_gradient(sequence_mean(log_ratio, sequences), inputs)
    return clipped_loss(ratio, inputs, cfg.gspo.clip_low, cfg.gspo.clip_high, cfg.dual_clip)


def ctpo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """CTPO (arXiv 2605.07331): PPO on the ratio of all tokens up to this one, the t-th. [code]

    log w = sum of log r up to t (its mean with ``geometric_mean``), with the gradient of the token itself;
    bounds exp(-low t^power) and exp(high t^power), dual clip exp(dual t^power).
    """
    log_ratio, sequences = _log_ratio(inputs)
    position, own = position_in_sequence(log_ratio, sequences), cfg.ctpo
    log_weight = prefix_sum(log_ratio, sequences)
    ratio = _with_own_gradient(log_weight / position if own.geometric_mean else log_weight, inputs)
    width = position**own.power
    lower, upper, dual = (-own.low * width).exp(), (own.high * width).exp(), (own.dual * width).exp()
    return clipped_loss(ratio, inputs, 1 - lower, upper - 1, dual)


def vespo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """VESPO (arXiv 2602.10693): loss = -sg(phi) A log pi, phi = W^k exp(l (1 - W)), k and l by sign. [code]

    W is the product of r over the answer, log W held within +-20. phi is 1 at W = 1, largest at W = k / l,
    and falls to 0 on both sides: no clip. ``sequence_weight`` is the mean phi.
    """
    log_ratio, sequences = _log_ratio(inputs)
    log_weight = sequence_sum(log_ratio, sequences).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    right = cfg.vespo.right_power * log_weight + cfg.vespo.right_decay * (1 - log_weight.exp())
    wrong = cfg.vespo.wrong_power * log_weight + cfg.vespo.wrong_decay * (1 - log_weight.exp())
    phi = torch.where(inputs.advantages < 0, wrong, right).exp()
    return LossOutputs(-phi * inputs.advantages * inputs.log_probs, {"sequence_weight": TokenMetric(phi)})


def _log_ratio(inputs: LossInputs) -> tuple[Tensor, WholeSequences]:
    assert inputs.sequences is not None
    return log_importance_ratio(inputs.log_probs, inputs.old_log_probs).detach(), inputs.sequences


def _with_own_gradient(log_weight: Tensor, inputs: LossInputs) -> Tensor:
    """exp(log_weight), held within exp(+-20), times pi(y) / sg(pi(y)), which is 1."""
    log_unit = inputs.log_probs - inputs.log_probs.detach()
    return (log_weight + log_unit).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
