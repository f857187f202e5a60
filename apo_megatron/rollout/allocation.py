"""How many samples a prompt gets, and what share of its answers was right when it was last drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.objectives.sample_allocations import SAMPLE_ALLOCATIONS
from apo_megatron.types import Prompt, solve_rate


class SampleAllocator:
    """How many samples new prompts get, by ``rollout.allocation``; the same on every rank."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self._cfg, self._spec = cfg, SAMPLE_ALLOCATIONS[cfg.allocation]
        self.solve_rates: dict[str, float] = {}  # by prompt id; empty where the rule needs none

    def allocate(self, prompts: Sequence[Prompt]) -> list[int]:
        """Samples of each of the prompts that a round begins."""
        return self._spec.function([self.solve_rates.get(p.prompt_id) for p in prompts], self._cfg)

    def note(self, prompt: Prompt, rewards: Sequence[float | None]) -> None:
        """What came of a prompt."""
        rate = solve_rate(rewards) if self._spec.needs_solve_rates else None
        if rate is not None:
            self.solve_rates[prompt.prompt_id] = rate

    def go_on_from(self, solve_rates: Mapping[str, float]) -> None:
        """Take over what a checkpoint has, where the rule needs it."""
        self.solve_rates = dict(solve_rates) if self._spec.needs_solve_rates else {}
