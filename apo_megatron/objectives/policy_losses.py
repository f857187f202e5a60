"""The losses. A new one is a function here and a line in ``registry.py``."""

from __future__ import annotations

from torch import Tensor

from apo_megatron.config.schema import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs
from apo_megatron.objectives.ratios import anchor_ratio, importance_ratio, rectified_ratio
from apo_megatron.objectives.surrogates import clipped_surrogate
from apo_megatron.objectives.token_metrics import clip_metrics


def vanilla(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """The GRPO / PPO baseline: the clipped surrogate of the importance ratio."""
    return _clipped(importance_ratio(inputs.log_probs, inputs.old_log_probs), inputs, cfg)


def apo_ratio(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """APO (arXiv 2602.05717): where A < 0 the rectified ratio takes the place of the importance ratio."""
    assert inputs.anchor_log_mass is not None and inputs.reference_anchor_log_mass is not None
    rectified = rectified_ratio(
        importance_ratio(inputs.log_probs, inputs.old_log_probs),
        anchor_ratio(inputs.anchor_log_mass, inputs.reference_anchor_log_mass),
        inputs.advantages,
        cfg.apo_push_coeff,
        cfg.apo_pull_coeff,
    )
    return _clipped(rectified, inputs, cfg)


def supervised(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """Cross-entropy of demonstrations; looks at nothing but ``log_probs``."""
    return LossOutputs(-inputs.log_probs)


def _clipped(ratio: Tensor, inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    loss = clipped_surrogate(ratio, inputs.advantages, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    return LossOutputs(loss, clip_metrics(ratio, inputs.advantages, cfg))
