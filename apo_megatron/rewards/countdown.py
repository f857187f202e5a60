"""Countdown: reach a target with some of the given numbers. The exact verifier parses, never evaluates."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from apo_megatron.config.reward import RewardConfig
from apo_megatron.errors import DataError
from apo_megatron.rewards.judging import wrong_answer
from apo_megatron.types import Completion, Prompt

_NUMBER = re.compile("0|[1-9][0-9]{0,8}")  # ASCII digits, no sign, no leading zero, bounded size
_OPERATOR = re.compile(r"[+*-]")
_OPERATORS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
}


def verify(numbers: Sequence[int], target: int, text: str, num_used: int = 3) -> bool:
    """Whether ``text`` reaches ``target`` with exactly ``num_used`` of ``numbers``, each used at most once.

    ``text`` alternates numbers and operators (+ - *), one space between two tokens, and is worked out
    strictly from left to right, without precedence: ``4 * 15 - 2`` or ``2 + 3 * 4`` = 20. Spaces around it
    are allowed; anything else is wrong, never an error.
    """
    tokens = text.strip(" ").split(" ", maxsplit=2 * num_used)
    if len(tokens) != 2 * num_used - 1:
        return False
    if not all(map(_NUMBER.fullmatch, tokens[0::2])) or not all(t in _OPERATORS for t in tokens[1::2]):
        return False
    used = [int(token) for token in tokens[0::2]]
    if not Counter(used) <= Counter(numbers):
        return False
    value = used[0]
    for symbol, number in zip(tokens[1::2], used[1:], strict=True):
        value = _OPERATORS[symbol](value, number)
    return value == target


class CountdownReward:
    """1.0 for a right answer that ended by itself, else 0.0."""

    required_fields: Mapping[str, type] = MappingProxyType({"numbers": list, "target": int})

    def __init__(self, cfg: RewardConfig) -> None:
        """Made as every reward of the registry; there is nothing to set."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """Reward of each completion of one prompt; NaN for one that the engine aborted.

        Raises DataError naming prompt and column where the prompt's row is not a Countdown problem.
        """
        numbers, target = _problem(prompt)
        verdicts: dict[str, bool] = {}  # samples of one prompt repeat each other
        rewards = []
        for completion in completions:
            if completion.finish_reason == "abort":
                rewards.append(math.nan)
                continue
            if completion.text not in verdicts:
                verdicts[completion.text] = verify(numbers, target, completion.text)
            rewards.append(float(verdicts[completion.text] and completion.finish_reason == "stop"))
        return rewards

    def answers(
        self, prompt: Prompt, completions: Sequence[Completion], rewards: Sequence[float]
    ) -> list[str | None]:
        """Expressions without white space; None for no text, and where a completion was cut or not judged."""
        numbers, target = _problem(prompt)
        return [
            None
            if math.isnan(reward) or completion.finish_reason != "stop"
            else _expression(completion.text, reward >= 1, numbers, target)
            for completion, reward in zip(completions, rewards, strict=True)
        ]


def _expression(text: str, is_right: bool, numbers: Sequence[int], target: int) -> str | None:
    expression = "".join(text.split())
    if is_right:
        return expression
    # "4*15-2" is written wrongly; without its spaces "4 * 15 - 2", which is right, is the same text.
    well_written = _OPERATOR.sub(r" \g<0> ", expression)
    right = expression if verify(numbers, target, well_written) else None
    return wrong_answer(expression, right)


def _problem(prompt: Prompt) -> tuple[list[int], int]:
    for name in CountdownReward.required_fields:
        if name not in prompt.fields:
            raise DataError(
                f"prompt {prompt.prompt_id!r}: column {name!r} is missing: the countdown reward needs "
                '"numbers" (a list of integers) and "target" (an integer)'
            )
    numbers, target = prompt.fields["numbers"], prompt.fields["target"]
    if not isinstance(numbers, list) or not all(map(_is_integer, numbers)):
        raise DataError(
            f"prompt {prompt.prompt_id!r}: column 'numbers' is {numbers!r}, expected a list of integers"
        )
    if not _is_integer(target):
        raise DataError(f"prompt {prompt.prompt_id!r}: column 'target' is {target!r}, expected an integer")
    return numbers, target


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
