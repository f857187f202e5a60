"""Whether two answers are mathematically equal, by math-verify. Runs in worker processes only.

math-verify's own time-outs are off (None): they are signals, which exist in main threads only and hide a
time-out as a wrong answer. The deadline is that of the worker.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time-outs are off

_DELIMITER = re.compile(r"\$|\\boxed|\\\(|\\\[")


def is_equivalent(gold: str, answer: str) -> bool:
    """Whether ``answer``, as ``answers.final_answer`` gives it, is mathematically equal to ``gold``."""
    from math_verify import verify  # the trainer knows this module, and need not load sympy

    return bool(answer) and bool(verify(_parsed_gold(gold), _parse(answer), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parsed_gold(gold: str) -> list[Any]:
    return _parse(gold if _DELIMITER.search(gold) else f"$\\boxed{{{gold}}}$")


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, _targets(), parsing_timeout=None))


@lru_cache(maxsize=1)
def _targets() -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()
