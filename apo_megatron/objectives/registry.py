"""Which losses there are, and what each needs computed for it."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.objectives.interface import Need, PolicyLoss
from apo_megatron.objectives.policy_losses.apo import apo_ratio
from apo_megatron.objectives.policy_losses.bounded_ratio import gbpo
from apo_megatron.objectives.policy_losses.clipped import dcpo_clip, gppo, sapo, vanilla
from apo_megatron.objectives.policy_losses.supervised import supervised
from apo_megatron.objectives.policy_losses.weighted import cispo, dispo, dppo_tv


@dataclass(frozen=True)
class PolicyLossSpec:
    """A loss and its declared needs; what is not declared is not computed for it."""

    function: PolicyLoss
    needs: frozenset[Need] = frozenset()
    uses_rollouts: bool = True  # false: demonstrations, so no old policy, no advantages, no reference


POLICY_LOSSES: dict[str, PolicyLossSpec] = {
    "apo_ratio": PolicyLossSpec(apo_ratio, needs=frozenset({"anchor"})),
    "vanilla": PolicyLossSpec(vanilla),
    "cispo": PolicyLossSpec(cispo),
    "dispo": PolicyLossSpec(dispo),
    "sapo": PolicyLossSpec(sapo),
    "gppo": PolicyLossSpec(gppo),
    "dcpo_clip": PolicyLossSpec(dcpo_clip),
    "dppo_tv": PolicyLossSpec(dppo_tv),
    "gbpo": PolicyLossSpec(gbpo, needs=frozenset({"target_advantages"})),
    "supervised": PolicyLossSpec(supervised, uses_rollouts=False),
}
