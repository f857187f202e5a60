"""What happened while the samples of one step were drawn, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apo_megatron.types import SampleGroup


@dataclass
class StepCounts:
    """Over all ranks, but for ``wait_seconds``."""

    num_rounds: int = 0
    num_starts: int = 0  # of generations: more than rounds where one was stopped for an update
    num_prompts_drawn: int = 0
    num_complete: int = 0  # groups that the rounds completed
    num_accepted: int = 0  # of them, without those that dynamic sampling replaces
    num_zero_spread: int = 0  # groups dropped because they teach nothing
    num_fillers: int = 0  # groups that teach nothing and fill the step up
    num_surplus: int = 0  # complete groups that nobody needs: their prompts are drawn again
    num_unfinished: int = 0  # groups that were stopped: their prompts are drawn again
    num_samples_carried: int = 0  # that go over into the next step, begun or complete
    num_samples_stale: int = 0  # dropped as too old
    wait_seconds: float = 0.0  # that this rank waited for the engine

    def metrics(self, groups: Sequence[SampleGroup], policy_version: int) -> dict[str, float]:
        """With the age of the tokens that ``groups`` are made of, in versions behind ``policy_version``."""
        ages = [policy_version - sample.completion.policy_version for g in groups for sample in g.samples]
        return {
            "rollout/staleness": sum(ages) / len(ages),
            "rollout/max_staleness": float(max(ages)),
            "rollout/largest_group": float(max(len(group.samples) for group in groups)),
            "rollout/num_prompts_drawn": float(self.num_prompts_drawn),
            "rollout/num_refills": float(max(0, self.num_rounds - 1)),
            "rollout/num_groups_zero_spread": float(self.num_zero_spread),
            "rollout/num_groups_filled_up": float(self.num_fillers),
            "rollout/num_groups_surplus": float(self.num_surplus),
            "rollout/num_groups_unfinished": float(self.num_unfinished),
            "rollout/num_samples_carried": float(self.num_samples_carried),
            "rollout/num_samples_stale": float(self.num_samples_stale),
            "time/waiting_for_engine": self.wait_seconds,
        }
