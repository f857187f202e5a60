"""Losses of the form -sg(weight) A log pi(y): the weight has no gradient, so it bounds none away.

All tensors are [T]. At r = 1 the weight is 1 and the gradient -A d log pi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs
from apo_megatron.objectives.ratios import importance_ratio
from apo_megatron.objectives.surrogates import ClippedTokens
from apo_megatron.objectives.token_metrics import bound_metrics, clip_metrics


def cispo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """CISPO (arXiv 2506.13585): weight = clip(r, 1 - clip_low, 1 + clip_high). [code]

    Every token keeps a gradient. By default there is no lower bound and the upper one is 5.
    """
    ratio = _detached_ratio(inputs)
    weights = ratio.clamp(1 - cfg.cispo.clip_low, 1 + cfg.cispo.clip_high)
    return _bounded(weights, ratio, inputs)


def dispo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """DISPO (arXiv 2602.00983): CISPO with bounds of their own for right and wrong answers. [second-hand]

    Experimental: no code of the authors is known. Equal bounds are CISPO.
    """
    ratio, bounds = _detached_ratio(inputs), cfg.dispo
    right = ratio.clamp(1 - bounds.right_clip_low, 1 + bounds.right_clip_high)
    wrong = ratio.clamp(1 - bounds.wrong_clip_low, 1 + bounds.wrong_clip_high)
    return _bounded(torch.where(inputs.advantages < 0, wrong, right), ratio, inputs)


def dppo_tv(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """DPPO, total variation form (arXiv 2602.04879): a mask by probabilities instead of a clip. [code]

    weight = min(r, max_weight); 0 where A > 0 and pi_theta(y) - pi_old(y) > max_increase, and where A < 0
    and pi_old(y) - pi_theta(y) > max_decrease. So a rare token may change its ratio many times over.
    """
    increase = (inputs.log_probs.exp() - inputs.old_log_probs.exp()).detach()
    is_low = (inputs.advantages < 0) & (-increase > cfg.dppo.max_decrease)
    is_high = (inputs.advantages > 0) & (increase > cfg.dppo.max_increase)
    weights = _detached_ratio(inputs).clamp(max=cfg.dppo.max_weight)
    loss = torch.where(is_low | is_high, 0.0, -weights * inputs.advantages * inputs.log_probs)
    masked = ClippedTokens(is_low, is_high, None)
    return LossOutputs(loss, clip_metrics(masked, inputs.advantages))


def _detached_ratio(inputs: LossInputs) -> Tensor:
    return importance_ratio(inputs.log_probs, inputs.old_log_probs).detach()


def _bounded(weights: Tensor, ratio: Tensor, inputs: LossInputs) -> LossOutputs:
    metrics = bound_metrics(is_low=weights > ratio, is_high=weights < ratio)
    return LossOutputs(-weights * inputs.advantages * inputs.log_probs, metrics)
