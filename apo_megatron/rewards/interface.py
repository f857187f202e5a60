"""What a reward is. Implementations are in the modules beside this one, and in other people's packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from apo_megatron.types import Completion, Prompt


class Reward(Protocol):
    """Judges the completions of one prompt."""

    @property
    def required_fields(self) -> Mapping[str, type]:
        """Columns, with their types, that every dataset row needs; checked when the data is loaded."""
        ...

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """One reward per completion: 1.0 right, 0.0 wrong, NaN could not be judged (not trained on).

        Raises DataError for a prompt without the columns it needs, RewardError where judging itself fails.
        """
        ...


@runtime_checkable
class BatchReward(Reward, Protocol):
    """A reward that is quicker when it sees the completions of many prompts at once."""

    def score_batch(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        """What ``score`` says of each prompt and its completions, in order; raises as ``score``."""
        ...


@runtime_checkable
class TermReward(Reward, Protocol):
    """A reward that is made of others, its terms."""

    def score_terms(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[tuple[float, ...]]]:
        """What each term says of each prompt's completions, in order; raises as ``score``."""
        ...

    def total(self, terms: tuple[float, ...]) -> float:
        """The reward of a completion, from what the terms said."""
        ...


@runtime_checkable
class WorkerReward(Reward, Protocol):
    """A reward with processes of its own."""

    def close(self) -> None:
        """End them; the next answer starts new ones."""
        ...


@runtime_checkable
class AnswerReward(Reward, Protocol):
    """A reward that reads a final answer, which majority voting counts."""

    def answers(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[float]
    ) -> list[str | None]:
        """The final answer of each completion, given what ``score`` said of them: equal answers, equal text.

        None where there is none, or where the completion was cut or could not be judged. No text is the
        answer both of a right and of a wrong completion of the prompt. Raises as ``score``.
        """
        ...


def score_batch(
    reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
) -> list[list[float]]:
    """The rewards of each prompt's completions: all at once where the reward can, else prompt by prompt."""
    assert len(prompts) == len(completions), "completions belong to prompts"
    if isinstance(reward, BatchReward):
        return reward.score_batch(prompts, completions)
    return [reward.score(prompt, answers) for prompt, answers in zip(prompts, completions, strict=True)]
