"""The loss of the cold start (``apo-sft``)."""

from __future__ import annotations

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, LossOutputs


def supervised(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """Cross-entropy of demonstrations; looks at nothing but ``log_probs``."""
    return LossOutputs(-inputs.log_probs)
