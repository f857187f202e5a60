"""Losses of the importance ratio r: clipped, or closed softly. At r = 1 the gradient of each is -A d log pi.

All tensors are [T]. They differ in what happens to tokens that have left the neighbourhood of r = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs, TokenMetric
from apo_megatron.objectives.ratios import importance_ratio
from apo_megatron.objectives.surrogates import clipped_surrogate, clipped_tokens
from apo_megatron.objectives.token_metrics import bound_metrics, clip_metrics


def vanilla(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """GRPO / PPO (arXiv 2402.03300, 1707.06347), with DAPO's bounds (2503.14476) by default. [code]"""
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    return clipped_loss(ratio, inputs, cfg.clip_low, cfg.clip_high, cfg.dual_clip)


def gppo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """GPPO (arXiv 2508.07629), CE-GPPO (2509.20712): clipped as in PPO, but with a gradient. [code]

    Where PPO clips, r is replaced by bound * (1 + b (r / sg(r) - 1)): the value is the bound, the gradient
    b * bound * d log pi. b is ``right_gradient`` above, ``wrong_gradient`` below: GPPO if both are 1, PPO if
    both are 0. The authors multiply the value by b, too; the gradient is the same. What ``dual_clip`` cuts
    has none.
    """
    ratio, advantages = importance_ratio(inputs.log_probs, inputs.old_log_probs), inputs.advantages
    clipped = clipped_tokens(ratio, advantages, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    unit = ratio / ratio.detach()  # 1, with the gradient d log pi
    at_low = (1 - cfg.clip_low) * (1 + cfg.gppo.wrong_gradient * (unit - 1))
    at_high = (1 + cfg.clip_high) * (1 + cfg.gppo.right_gradient * (unit - 1))
    bounded = torch.where(clipped.low, at_low, torch.where(clipped.high, at_high, ratio))
    metrics = bound_metrics(clipped.low, clipped.high)
    if clipped.dual is not None:
        bounded = torch.where(clipped.dual, ratio.clamp(max=cfg.dual_clip), bounded)
        metrics["dual_clip_fraction"] = TokenMetric(clipped.dual)
    return LossOutputs(-advantages * bounded, metrics)


def dcpo_clip(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """The clip range of DCPO (arXiv 2509.02333): PPO with bounds for each token, from q = pi_old(y). [code]

    lower = (1 + sqrt(max(0, 1 - 4 clip_low / q))) / 2, upper = min((1 + sqrt(1 + 4 clip_high / q)) / 2,
    max_ratio): where |r (r - 1)| q reaches clip_low or clip_high. The rarer the token, the wider; lower is
    never less than 1/2. DCPO's advantages (statistics kept for each prompt) are no part of it.
    """
    old_probs = inputs.old_log_probs.exp()
    lower = (1 + (1 - 4 * cfg.dcpo.clip_low / old_probs).clamp(min=0).sqrt()) / 2
    upper = ((1 + (1 + 4 * cfg.dcpo.clip_high / old_probs).sqrt()) / 2).clamp(max=cfg.dcpo.max_ratio)
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    return clipped_loss(ratio, inputs, 1 - lower, upper - 1, cfg.dual_clip)


def sapo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """SAPO (arXiv 2511.20347): loss = -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A. [code]

    Its gradient is that of -A r times a gate 4 s (1 - s), s = sigmoid(tau (r - 1)), which is 1 at r = 1 and
    closes on both sides. No clip range, no dual clip. ``soft_gate`` is the mean gate.
    """
    ratio, is_wrong = importance_ratio(inputs.log_probs, inputs.old_log_probs), inputs.advantages < 0
    tau = torch.full_like(ratio, cfg.sapo.right_temperature)
    tau = tau.masked_fill(is_wrong, cfg.sapo.wrong_temperature)
    opening = torch.sigmoid(tau * (ratio - 1))
    gate = 4 * (opening * (1 - opening)).detach()
    return LossOutputs(-inputs.advantages * 4 / tau * opening, {"soft_gate": TokenMetric(gate)})


def clipped_loss(
    ratio: Tensor,
    inputs: LossInputs,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None,
) -> LossOutputs:
    """The clipped surrogate of any ratio [T], and which tokens it clips."""
    loss = clipped_surrogate(ratio, inputs.advantages, clip_low, clip_high, dual_clip)
    clipped = clipped_tokens(ratio, inputs.advantages, clip_low, clip_high, dual_clip)
    return LossOutputs(loss, clip_metrics(clipped, inputs.advantages))
