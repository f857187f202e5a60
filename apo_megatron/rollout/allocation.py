"""How many samples a prompt gets, and what share of its answers was right when it was last drawn."""

from __future__ import annotations

from collections.abc import Sequence

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.objectives.sample_allocations import SAMPLE_ALLOCATIONS
from apo_megatron.types import Prompt


class SampleAllocator:
    """How many samples new prompts get, by ``rollout.allocation``; the same on every rank."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self._cfg, self._spec = cfg, SAMPLE_ALLOCATIONS[cfg.allocation]
        self.success_rates: dict[str, float] = {}  # by prompt id; empty where the rule needs none

    def allocate(self, prompts: Sequence[Prompt]) -> list[int]:
        """Samples of each of the prompts that a round begins."""
        return self._spec.function([self.success_rates.get(p.prompt_id) for p in prompts], self._cfg)

    def note(self, prompt: Prompt, rewards: Sequence[float | None]) -> None:
        """What came of a prompt. Right is a reward of 1 or more; what could not be judged does not count."""
        judged = [reward for reward in rewards if reward is not None and reward == reward]
        if self._spec.needs_success_rates and judged:
            self.success_rates[prompt.prompt_id] = sum(reward >= 1 for reward in judged) / len(judged)
