"""The objective, in plain torch: per-token tensors in, one weighted loss and named metrics out.

Formulas: docs/objective.md. Anchored Policy Optimization is arXiv 2602.05717.
"""

from apo_megatron.objectives.advantage_registry import (
    ADVANTAGE_ESTIMATORS,
    AdvantageEstimatorSpec,
    estimate_advantages,
    teaching_groups,
)
from apo_megatron.objectives.advantages import AdvantageInputs, group_normalized_advantages, mixed_groups
from apo_megatron.objectives.aggregation import sequence_weights
from apo_megatron.objectives.corrections import MISMATCH_CORRECTIONS
from apo_megatron.objectives.diagnostics import MetricSums
from apo_megatron.objectives.interface import (
    BatchStatistics,
    LossInputs,
    LossOutputs,
    MiniBatchInputs,
    TokenMetric,
)
from apo_megatron.objectives.kl import kl_k1, kl_k2, kl_k3
from apo_megatron.objectives.mismatch import mismatch_metrics, mismatch_weights
from apo_megatron.objectives.moving_coefficients import MovingObjective
from apo_megatron.objectives.objective import Objective, build_objective, supervised_objective
from apo_megatron.objectives.ratios import anchor_ratio, importance_ratio, rectified_ratio
from apo_megatron.objectives.registry import POLICY_LOSSES, PolicyLossSpec
from apo_megatron.objectives.sequences import WholeSequences
from apo_megatron.objectives.surrogates import clipped_surrogate

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "MISMATCH_CORRECTIONS",
    "POLICY_LOSSES",
    "AdvantageEstimatorSpec",
    "AdvantageInputs",
    "BatchStatistics",
    "LossInputs",
    "LossOutputs",
    "MetricSums",
    "MiniBatchInputs",
    "MovingObjective",
    "Objective",
    "PolicyLossSpec",
    "TokenMetric",
    "WholeSequences",
    "anchor_ratio",
    "build_objective",
    "clipped_surrogate",
    "estimate_advantages",
    "group_normalized_advantages",
    "importance_ratio",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "mismatch_metrics",
    "mismatch_weights",
    "mixed_groups",
    "rectified_ratio",
    "sequence_weights",
    "supervised_objective",
    "teaching_groups",
]
