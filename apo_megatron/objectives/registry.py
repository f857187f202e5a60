"""Which losses there are, and what each needs computed for it."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.objectives.interface import Need, PolicyLoss
from apo_megatron.objectives.policy_losses import apo_ratio, supervised, vanilla


@dataclass(frozen=True)
class PolicyLossSpec:
    """A loss and its declared needs; what is not declared is not computed for it."""

    function: PolicyLoss
    needs: frozenset[Need] = frozenset()
    uses_rollouts: bool = True  # false: demonstrations, so no old policy, no advantages, no reference


POLICY_LOSSES: dict[str, PolicyLossSpec] = {
    "apo_ratio": PolicyLossSpec(apo_ratio, needs=frozenset({"anchor"})),
    "vanilla": PolicyLossSpec(vanilla),
    "supervised": PolicyLossSpec(supervised, uses_rollouts=False),
}
