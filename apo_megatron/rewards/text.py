"""Rewards that compare text: exact match, and the letter of a multiple-choice question."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from apo_megatron.config.reward import RewardConfig
from apo_megatron.errors import DataError
from apo_megatron.rewards.answers import MAX_TEXT, boxed_answer
from apo_megatron.rewards.judging import gold_answer, judged_rewards, voted_answers
from apo_megatron.types import Completion, Prompt

_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_SPACE = r"\s{0,3}"  # bounded: an answer of blanks must not be searched in cubic time
_SAID_LETTER = re.compile(
    rf"(?i:answer|option|choice){_SPACE}(?i:is)?{_SPACE}[:=]?{_SPACE}[*\"'$(\[]{{0,4}}([A-Z])(?![A-Za-z'])(?!(?<=I)\s+[a-z])"
)
_ONLY_LETTER = re.compile(r"[*\"'$(\[]{0,4}([A-Z])[)\]*.:\"'$]{0,4}")
_BARE_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:].*)?", re.DOTALL)


class ExactMatchReward:
    r"""Right is the very text of the gold answer, up to white space.

    The answer is the content of the last ``\boxed{...}``, or the whole completion where nothing is boxed.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        self._field = cfg.answer_field
        self.required_fields: Mapping[str, type] = {cfg.answer_field: object}  # its type is seen by score

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """Rewards as ``judged_rewards`` says; DataError for a prompt without a gold answer."""
        gold = self._gold(prompt)
        return judged_rewards(completions, lambda text: _answer(text) == gold)

    def answers(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[float]
    ) -> list[str | None]:
        """Answers as ``voted_answers`` says, with single spaces."""
        return voted_answers(completions, rewards, self._gold(prompt), _answer)

    def _gold(self, prompt: Prompt) -> str:
        return _single_spaced(gold_answer(prompt, self._field))


def _answer(text: str) -> str:
    boxed = boxed_answer(text)
    return _single_spaced(text if boxed is None else boxed)


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


class MultipleChoiceReward:
    """Right is the letter of the gold answer, as ``chosen_letter`` finds it."""

    def __init__(self, cfg: RewardConfig) -> None:
        self._field = cfg.answer_field
        self.required_fields: Mapping[str, type] = {cfg.answer_field: str}

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """Rewards as ``judged_rewards`` says; DataError for a gold answer that is not one letter."""
        gold = self._gold(prompt)
        return judged_rewards(completions, lambda text: chosen_letter(text) == gold)

    def answers(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[float]
    ) -> list[str | None]:
        """Answers as ``voted_answers`` says: letters."""
        return voted_answers(completions, rewards, self._gold(prompt), chosen_letter)

    def _gold(self, prompt: Prompt) -> str:
        text = gold_answer(prompt, self._field)
        gold = text.strip("() .").upper()
        if not re.fullmatch("[A-Z]", gold):
            raise DataError(
                f"prompt {prompt.prompt_id!r}: column {self._field!r} is {text[:40]!r}, expected the letter "
                "of the right choice: A to Z"
            )
        return gold


def chosen_letter(text: str) -> str | None:
    r"""The letter that ``text`` chooses, in upper case, or None.

    Read, in this order: the last ``\boxed{...}`` ("B", "(b)", "B. Paris", "\text{B}"); the last "answer is
    (B)", "Answer: B", "option B"; a last line that is nothing but a letter.
    """
    text = text[-MAX_TEXT:]
    boxed = boxed_answer(text)
    if boxed is not None:
        content = _BARE_LETTER.fullmatch(_WRAPPED.sub(r"\1", boxed).strip(" $*"))
        return content.group(1).upper() if content else None
    plain = _WRAPPED.sub(r"\1", text).rstrip()
    said = _SAID_LETTER.findall(plain)
    if said:
        return str(said[-1])
    alone = _ONLY_LETTER.fullmatch(plain.rpartition("\n")[2].strip())
    return alone.group(1) if alone else None
