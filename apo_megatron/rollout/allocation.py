"""How many samples a prompt gets, and what share of its newest answers was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.objectives.sample_allocations import SAMPLE_ALLOCATIONS
from apo_megatron.types import Prompt

# As in the release of Knapsack RL: fewer answers say too little of a prompt, and more of them, drawn by other
# weights, say what it was.
NUM_POOLED = 16  # newest answers that a share is taken of; all of the last visit where those are more
NUM_TRUSTED = 8  # with fewer answers the share is unknown


class SampleAllocator:
    """How many samples new prompts get, by ``rollout.allocation``; the same on every rank."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self._cfg, self._spec = cfg, SAMPLE_ALLOCATIONS[cfg.allocation]
        # By prompt id its newest answers, the last one last: "1" is right, "0" is wrong. Empty where the rule
        # needs none.
        self.solve_rates: dict[str, str] = {}

    def allocate(self, prompts: Sequence[Prompt]) -> list[int]:
        """Samples of each of the prompts that a round begins."""
        return self._spec.function([self.solve_rate(p.prompt_id) for p in prompts], self._cfg)

    def solve_rate(self, prompt_id: str) -> float | None:
        """The share of right answers among the newest; None while there are too few."""
        answers = self.solve_rates.get(prompt_id, "")
        return answers.count("1") / len(answers) if len(answers) >= NUM_TRUSTED else None

    def note(self, prompt: Prompt, rewards: Sequence[float | None]) -> None:
        """What came of a prompt. Right is a reward of 1 or more; what could not be judged does not count."""
        judged = [reward for reward in rewards if reward is not None and reward == reward]
        if self._spec.needs_solve_rates and judged:
            answers = "".join("1" if reward >= 1 else "0" for reward in judged)
            known = self.solve_rates.get(prompt.prompt_id, "") + answers
            self.solve_rates[prompt.prompt_id] = known[-max(NUM_POOLED, len(answers)) :]

    def go_on_from(self, solve_rates: Mapping[str, str]) -> None:
        """Take over what a checkpoint has, where the rule needs it."""
        self.solve_rates = dict(solve_rates) if self._spec.needs_solve_rates else {}
