"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from apo_megatron.rewards.interface import Reward, score_batch
from apo_megatron.types import Completion, Prompt


class WeightedReward:
    """The sum of weight x reward. A completion that one of them could not judge is not judged: NaN."""

    def __init__(self, terms: Sequence[tuple[Reward, float]]) -> None:
        self._terms = list(terms)

    @property
    def required_fields(self) -> Mapping[str, type]:
        """The columns of all of them; where two ask for one column, the narrower type."""
        fields: dict[str, type] = {}
        for reward, _ in self._terms:
            for name, kind in reward.required_fields.items():
                if name not in fields or issubclass(kind, fields[name]):
                    fields[name] = kind
        return fields

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """One weighted sum per completion; raises what the rewards raise."""
        return self.score_batch([prompt], [completions])[0]

    def score_batch(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        """Weighted sums, by prompt."""
        terms = self.score_terms(prompts, completions)
        return [[self.total(values) for values in of_prompt] for of_prompt in terms]

    def score_terms(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[tuple[float, ...]]]:
        """What each of the rewards says, without its weight."""
        scores = [score_batch(reward, prompts, completions) for reward, _ in self._terms]
        return [list(zip(*of_prompt, strict=True)) for of_prompt in zip(*scores, strict=True)]

    def total(self, terms: tuple[float, ...]) -> float:
        """The weighted sum of what the rewards said."""
        # Rounded: weights that a person adds up to 1 (0.7, 0.2, 0.1) must give 1, which is what counts as
        # right.
        return round(math.fsum(w * v for (_, w), v in zip(self._terms, terms, strict=True)), 12)
