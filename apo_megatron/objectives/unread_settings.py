"""Settings that somebody has made and that change nothing: mostly those of another method."""

from __future__ import annotations

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.schema import RLConfig
from apo_megatron.objectives.advantage_registry import ADVANTAGE_ESTIMATORS
from apo_megatron.objectives.corrections import MISMATCH_CORRECTIONS
from apo_megatron.objectives.objective import build_objective
from apo_megatron.objectives.sample_allocations import SAMPLE_ALLOCATIONS
from apo_megatron.objectives.sample_filters import SAMPLE_FILTERS

# Choices and switches, which are read in any case.
_ALWAYS_READ = {
    "loss_mode",
    "advantage_estimator",
    "loss_aggregation",
    "loss_aggregation_constant",
    "old_log_probs",
    "mismatch_correction",
    "off_policy_mask",
    "use_kl_loss",
    "use_kl_loss_on_wrong",
    "entropy_coeff",
}


def unread_settings(cfg: RLConfig) -> list[str]:
    """The settings of methods that are not at their default, and that nothing chosen in ``cfg`` reads.

    No error: a file may hold the settings of several methods, so that one line switches between them.
    """
    rollout, defaults = cfg.rollout, type(cfg.rollout)()
    unread = [f"objective.{name}" for name in _unread(cfg.objective)]
    for chosen, methods in (
        (rollout.sample_filter, SAMPLE_FILTERS),
        (rollout.allocation, SAMPLE_ALLOCATIONS),
    ):  # the section of each is named after it
        others = [name for name in methods if name != chosen and hasattr(rollout, name)]
        unread += [f"rollout.{name}" for name in others if getattr(rollout, name) != getattr(defaults, name)]
    return unread


def unread_note(cfg: RLConfig) -> str | None:
    """``unread_settings`` in a sentence for the user; None where there are none."""
    unread = unread_settings(cfg)
    return f"set, but without effect on the methods chosen: {', '.join(unread)}" if unread else None


def with_unread_at_defaults(cfg: ObjectiveConfig) -> ObjectiveConfig:
    """The same for any two that train alike: what nothing reads is what it would be if nobody had set it."""
    defaults = ObjectiveConfig()
    return cfg.model_copy(update={name: getattr(defaults, name) for name in _unread(cfg)})


def _unread(cfg: ObjectiveConfig) -> list[str]:
    objective, defaults = build_objective(cfg), ObjectiveConfig()
    read = _ALWAYS_READ | objective.spec.reads | MISMATCH_CORRECTIONS[cfg.mismatch_correction].reads
    read |= {objective.spec.settings or "", ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].settings or ""}
    if not objective.loss_needs_support:
        read |= {"support_telemetry"}
    if objective.needs_support:
        read |= {"apo_topk", "apo_exclude_sampled"}
    if objective.uses_kl_penalty:
        read |= {"kl_loss_coeff", "kl_estimator"}
    changed = [name for name in type(cfg).model_fields if getattr(cfg, name) != getattr(defaults, name)]
    return [name for name in changed if name not in read]
