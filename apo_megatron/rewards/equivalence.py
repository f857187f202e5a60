r"""Whether two answers are mathematically equal, by math-verify. Runs in worker processes only.

math-verify's own time-outs are off (None): they are signals, which exist in main threads only and hide a
time-out as a wrong answer. The deadline is that of the worker. Inequalities and intervals may be compared.

What is done before math-verify reads an answer, because it would read it wrongly:

- the minus sign U+2212 and the en dash become "-"; NUL bytes go;
- a box that is nothing but a number in e-notation becomes a product: ``4.5e33`` would be 4.5 times Euler's
  number times 33 (gold answers of Minerva are written so);
- LaTeX spaces between groups of three digits go: ``1\,234`` is 1234;
- two words (``\text{east}``, or four letters and more) are compared as text, without regard to case: as
  products of their letters "seat" would be "east".
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from apo_megatron.rewards.answers import boxed_answer

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time-outs are off

_DELIMITER = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[")
_CHARACTERS = str.maketrans({"\u2212": "-", "\u2013": "-", "\0": None})
_DIGIT_SPACE = re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))")
# Exponents of up to three digits: larger numbers are no answers, and nobody should write them out.
_E_NOTATION = re.compile(r"\\boxed\s*\{\s*([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})\s*\}")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm)\s*\{([A-Za-z' -]+)\}")
_WORDS = re.compile(r"[A-Za-z' -]+")
_LONG_WORD = re.compile("[A-Za-z]{4}")


def is_equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer``, as ``answers.final_answer`` gives it, is mathematically equal to ``gold``."""
    from math_verify import verify  # the trainer knows this module, and need not load sympy

    if not answer:
        return False
    gold = gold if _DELIMITER.search(gold) else f"$\\boxed{{{gold}}}$"
    gold, answer = _normalized(gold), _normalized(answer)
    gold_words, words = _words(gold), _words(answer)
    if gold_words is not None and words is not None:
        return gold_words == words
    equal = verify(_parsed_gold(gold), _parse(answer), allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal)


def _normalized(text: str) -> str:
    text = _DIGIT_SPACE.sub("", text.translate(_CHARACTERS))
    return _E_NOTATION.sub(r"\\boxed{\1 \\times 10^{\2}}", text)


def _words(text: str) -> str | None:
    """The words of an answer that is nothing but words, in lower case."""
    content = (boxed_answer(text) or text).strip().strip("$").strip()
    in_command = _TEXT_COMMAND.fullmatch(content)
    is_bare = _WORDS.fullmatch(content) is not None and _LONG_WORD.search(content) is not None
    if in_command is None and not is_bare:
        return None
    return " ".join((in_command.group(1) if in_command else content).casefold().split())


@lru_cache(maxsize=1024)
def _parsed_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, _targets(), parsing_timeout=None))


@lru_cache(maxsize=1)
def _targets() -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()
