"""Settings that somebody has made and that change nothing: mostly those of another method."""

from __future__ import annotations

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.advantage_registry import ADVANTAGE_ESTIMATORS
from apo_megatron.objectives.corrections import MISMATCH_CORRECTIONS
from apo_megatron.objectives.objective import build_objective

# Choices and switches, which are read in any case.
_ALWAYS_READ = {
    "loss_mode",
    "advantage_estimator",
    "loss_aggregation",
    "loss_aggregation_constant",
    "support_telemetry",
    "old_log_probs",
    "mismatch_correction",
    "off_policy_mask",
    "use_kl_loss",
    "use_kl_loss_on_wrong",
    "entropy_coeff",
}


def unread_settings(cfg: ObjectiveConfig) -> list[str]:
    """The fields of ``objective`` that are not at their default, and that nothing chosen in ``cfg`` reads.

    No error: a file may hold the settings of several methods, so that one line switches between them.
    """
    objective, defaults = build_objective(cfg), ObjectiveConfig()
    read = _ALWAYS_READ | objective.spec.reads | MISMATCH_CORRECTIONS[cfg.mismatch_correction].reads
    read |= {objective.spec.settings or "", ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].settings or ""}
    if objective.needs_support:
        read |= {"apo_topk", "apo_exclude_sampled"}
    if objective.uses_kl_penalty:
        read |= {"kl_loss_coeff", "kl_estimator"}
    changed = [name for name in type(cfg).model_fields if getattr(cfg, name) != getattr(defaults, name)]
    return [f"objective.{name}" for name in changed if name not in read]
