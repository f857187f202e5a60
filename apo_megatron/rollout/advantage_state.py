"""What an advantage estimator keeps from one step to the next; a part of the checkpoint."""

from __future__ import annotations

from typing import Any

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives.advantage_registry import ADVANTAGE_ESTIMATORS


class AdvantageState:
    """Values that JSON can hold, by name, the same on every rank; none before the first step."""

    name = "advantages"  # of the part

    def __init__(self, cfg: ObjectiveConfig) -> None:
        self.is_stateful = ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].next_state is not None
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The values as they are: JSON keeps every bit of a float."""
        return {"values": dict(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved values."""
        self.values = dict(state["values"])
