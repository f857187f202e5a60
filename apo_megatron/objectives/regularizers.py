"""Terms that any loss can carry: KL to the reference, entropy bonus. Per token, weighted like the loss."""

from __future__ import annotations

import torch

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs, TokenMetric
from apo_megatron.objectives.kl import KL_ESTIMATORS


def kl_penalty(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """kl_loss_coeff * KL estimate [T]: on all tokens (use_kl_loss) or where A < 0 (use_kl_loss_on_wrong).

    Left-out tokens have exactly 0; the denominator stays that of all trained tokens.
    """
    assert inputs.reference_log_probs is not None
    is_chosen = inputs.advantages < 0
    if cfg.use_kl_loss:
        is_chosen = torch.ones_like(is_chosen)
    # A token without a reference compares with itself, so that not even its gradient sees the NaN.
    reference = torch.where(is_chosen, inputs.reference_log_probs, inputs.log_probs.detach())
    kl = torch.where(is_chosen, KL_ESTIMATORS[cfg.kl_estimator](inputs.log_probs, reference), 0.0)
    return LossOutputs(cfg.kl_loss_coeff * kl, {"kl_loss": TokenMetric(kl, is_chosen)})


def entropy_bonus(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """-entropy_coeff * H [T]: minimising the loss raises the entropy."""
    return LossOutputs(-cfg.entropy_coeff * inputs.entropy)
