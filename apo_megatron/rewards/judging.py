"""What all rewards with a gold answer have in common: which completions are judged, against what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal

from apo_megatron.errors import DataError
from apo_megatron.types import Completion, Prompt

MAX_ANSWER = 200  # characters of a wrong answer that are kept for votes

Judge = Callable[[str], bool | None]  # text -> right, wrong, or None: not judged
Reader = Callable[[str], str | None]  # text -> its final answer


def gold_answer(prompt: Prompt, field: str) -> str:
    """The gold answer in column ``field``: text, or a number as it is written.

    Raises DataError where the column is missing, empty, or something else.
    """
    if field not in prompt.fields:
        found = ", ".join(map(repr, prompt.fields)) or "none"
        raise DataError(
            f"prompt {prompt.prompt_id!r}: column {field!r} with the right answer is missing, found columns: "
            f"{found}; add it, or name the right one as reward.answer_field"
        )
    value = prompt.fields[field]
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")  # 0.00001, not 1e-05
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise DataError(
            f"prompt {prompt.prompt_id!r}: column {field!r} is {str(value)[:40]!r}, expected the right "
            "answer as text or a number"
        )
    return str(value).strip()


def judged_rewards(completions: Sequence[Completion], judge: Judge) -> list[float]:
    """1.0 for a right answer that ended by itself, 0.0 for a wrong or a cut one, NaN for not judged.

    NaN are those that the engine aborted, and those of which ``judge`` says None.
    """
    return [_reward(completion, judge) for completion in completions]


def _reward(completion: Completion, judge: Judge) -> float:
    if completion.finish_reason == "length":
        return 0.0
    verdict = None if completion.finish_reason == "abort" else judge(completion.text)
    return math.nan if verdict is None else float(verdict)


def voted_answers(
    completions: Sequence[Completion], rewards: Sequence[float], gold: str, read: Reader
) -> list[str | None]:
    """``AnswerReward.answers`` for a reward with one gold answer: every right completion votes for ``gold``.

    A wrong one votes for what ``read`` finds in its text. Where that is ``gold`` (the judge reads more or
    less than ``read`` does) it becomes another text.
    """
    return [
        _vote(completion, reward, gold, read) for completion, reward in zip(completions, rewards, strict=True)
    ]


def _vote(completion: Completion, reward: float, gold: str, read: Reader) -> str | None:
    if math.isnan(reward) or completion.finish_reason != "stop":
        return None
    return gold if reward >= 1 else wrong_answer(read(completion.text), gold)


def wrong_answer(answer: str | None, right: str | None) -> str | None:
    """``answer``, of bounded length, as a text that differs from ``right``; None where it is blank."""
    if answer is None or not answer.strip():
        return None
    answer = answer[:MAX_ANSWER]
    return f"{answer} (judged wrong)" if answer == right else answer
