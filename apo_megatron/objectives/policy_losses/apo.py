"""Anchored Policy Optimization (APO, arXiv 2602.05717)."""

from __future__ import annotations

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs
from apo_megatron.objectives.policy_losses.clipped import clipped_loss
from apo_megatron.objectives.ratios import anchor_ratio, importance_ratio, rectified_ratio


def apo_ratio(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """Where A < 0 the rectified ratio takes the place of the importance ratio in the clipped surrogate.

    With ``apo_variants.detach_pull`` the anchor ratio is a constant: it decides which tokens are clipped,
    and nothing raises P (our variant, from no paper).
    """
    assert inputs.anchor_log_mass is not None and inputs.reference_anchor_log_mass is not None
    anchor = anchor_ratio(inputs.anchor_log_mass, inputs.reference_anchor_log_mass)
    rectified = rectified_ratio(
        importance_ratio(inputs.log_probs, inputs.old_log_probs),
        anchor.detach() if cfg.apo_variants.detach_pull else anchor,
        inputs.advantages,
        cfg.apo_push_coeff,
        cfg.apo_pull_coeff,
    )
    return clipped_loss(rectified, inputs, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
