"""A loss that draws the ratio to a target instead of clipping it. All tensors are [T]."""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.policy_losses import GBPOConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs, TokenMetric
from apo_megatron.objectives.ratios import importance_ratio


def gbpo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """GBPO (arXiv 2604.18578): |A| |r - target|, the target inside [1 - clip_low, 1 + clip_high]. [code]

    The target says which way a sample goes, A only how fast: the gradient is |A| r sign(r - target) d log pi,
    0 where r is at its target and back to it beyond. At r = 1 it is -|A| sign(target - 1) d log pi.
    """
    assert inputs.target_advantages is not None
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    distance = (ratio - target_ratio(inputs.target_advantages, cfg.gbpo)).abs()
    metrics = {"target_distance": TokenMetric(distance.detach())}
    return LossOutputs(inputs.advantages.abs() * distance, metrics)


def target_ratio(target_advantages: Tensor, cfg: GBPOConfig) -> Tensor:
    """1 - clip_low + (clip_low + clip_high) sigmoid(z / temperature), [T] -> [T].

    Written so that z = 0 with equal bounds gives exactly 1: such a token starts at its target.
    """
    z = target_advantages / cfg.temperature
    return 1 + (cfg.clip_high * torch.sigmoid(z) - cfg.clip_low * torch.sigmoid(-z))
