"""Clipped losses that also look at the likeliest tokens of a position, those of the policy or the reference.

Tensors are [T], those of K tokens a position [T, K].
"""

from __future__ import annotations

from dataclasses import replace

import torch

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs, TokenMetric
from apo_megatron.objectives.policy_losses.clipped import clipped_loss, vanilla
from apo_megatron.objectives.ratios import importance_ratio
from apo_megatron.objectives.sequences import sequence_quantile


def simko(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """SimKO (arXiv 2510.14807): PPO that acts otherwise on the uncertain tokens of an answer. [code]

    Uncertain are tokens whose entropy is above the ``entropy_quantile`` of those of their answer. There

    - A > 0: r is replaced by (1 - mix) r + mix / K * sum_k sg(r / r_k) r_k over the policy's own Top-K, y
      among them or not, with r_k = pi_theta(k) / pi_old(k). Its value is r itself, so the clip is that of
      PPO and closes the gradient of all K, too; pi_old(k) cancels. Its gradient is
      r ((1 - mix) d log pi(y) + mix / K sum_k d log pi(k)).
    - A < 0 and y is the likeliest token: A is multiplied by ``wrong_top1_factor``.

    mix 0 and factor 1 are ``vanilla``, to the bit. ``uncertain_fraction`` is the share of uncertain tokens.
    """
    assert inputs.policy_topk_log_probs is not None and inputs.sampled_is_likeliest is not None
    assert inputs.sequences is not None
    own = cfg.simko
    entropy, is_wrong = inputs.entropy.detach(), inputs.advantages < 0
    is_uncertain = entropy > sequence_quantile(entropy, own.entropy_quantile, inputs.sequences)
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    top = inputs.policy_topk_log_probs
    towards_top = top.masked_fill(top.isneginf(), 0.0).mean(1) - inputs.log_probs
    shift = own.mix * ratio.detach() * (towards_top - towards_top.detach())  # 0, with a gradient
    mixed = ratio + torch.where(is_uncertain & (inputs.advantages > 0), shift, 0.0)
    is_sharpened = is_uncertain & is_wrong & inputs.sampled_is_likeliest
    factors = torch.ones_like(ratio).masked_fill(is_sharpened, own.wrong_top1_factor)
    scaled = replace(inputs, advantages=inputs.advantages * factors)
    outputs = clipped_loss(mixed, scaled, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    return LossOutputs(outputs.loss, {**outputs.metrics, "uncertain_fraction": TokenMetric(is_uncertain)})


def topk_forward_kl(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """GRPO's clipped loss plus weight * sum_{k in M} p_ref(k) (log p_ref(k) - log p_theta(k)).

    A baseline of this project, found by experiment: from no paper, and not APO, whose pull acts on wrong
    tokens inside the clip. M is the Top-K of the reference (``apo_topk``) with y where it is in M, on every
    trained token. p_ref is not renormalised over M: the sum is the part of KL(pi_ref || pi_theta) that M
    has, so it can be negative, and its gradient -sum_k p_ref(k) d log p_theta(k) is that of the whole KL
    without the tail. With ``solve_rate_weighting`` the weight is multiplied by (1 - s)^2, s the share of
    right answers to the prompt. Weight 0 is ``vanilla``, to the bit. A mismatch correction weighs the sum.
    [ours]
    """
    reference, current = inputs.reference_topk_log_probs, inputs.log_probs_at_reference_topk
    assert reference is not None and current is not None and inputs.solve_rates is not None
    own, is_token = cfg.topk_forward_kl, ~reference.isneginf()
    # Where the vocabulary has no k-th token both are -inf: 0 before the difference and after it.
    difference = torch.where(is_token, reference, 0.0) - torch.where(is_token, current, 0.0)
    kl = (reference.exp() * difference).sum(1)
    weights = torch.full_like(kl, own.weight)
    if own.solve_rate_weighting:
        weights = weights * (1 - inputs.solve_rates).square()
    outputs = vanilla(inputs, cfg)
    return LossOutputs(outputs.loss + weights * kl, {**outputs.metrics, "topk_forward_kl": TokenMetric(kl)})
