"""Gets the gold answer out of the column in which a benchmark publishes it."""

from __future__ import annotations

import math
from typing import Any

from apo_megatron.config.benchmarks import AnswerExtraction
from apo_megatron.data.rows import describe
from apo_megatron.errors import DataError
from apo_megatron.rewards.answers import boxed_answer

_EXPECTED: dict[AnswerExtraction, str] = {
    "as_is": "text or a number",
    "after_hashes": 'a solution that ends with "#### " and the answer',
    "boxed": r"a solution with its answer in \boxed{...}",
    "list": "a list of answers, each text or a number",
}


def extracted_answer(value: Any, extraction: AnswerExtraction, column: str, place: str) -> str | int | float:
    r"""The gold answer in ``value``, which is never blank.

    ``as_is``: the value; ``after_hashes``: what follows the last "####", without thousands separators
    (GSM8K); ``boxed``: the content of the last ``\boxed{...}``; ``list``: the parts, with commas between them
    and, where there are several, without dollar signs (OlympiadBench). Raises DataError naming ``place`` and
    ``column``.
    """
    found: str | int | float | None = None
    if extraction == "as_is":
        found = _atom(value)
    elif extraction == "list":
        found = _joined(value)
    elif isinstance(value, str) and extraction == "boxed":
        found = boxed_answer(value) or None
    elif isinstance(value, str):
        _, hashes, answer = value.rpartition("####")
        found = (answer.strip().replace(",", "") or None) if hashes else None
    if found is None:
        raise DataError(
            f"{place}: column {column!r} is {describe(value)}, in which there is no gold answer; expected "
            f"{_EXPECTED[extraction]} (answer_extraction={extraction}): mend the row, or name another column "
            "or answer_extraction"
        )
    return found


def _joined(value: Any) -> str | int | float | None:
    if not isinstance(value, list) or not value:
        return None
    parts = [_atom(part) for part in value]
    if None in parts:
        return None
    if len(parts) == 1:
        return parts[0]
    return ", ".join(str(part).strip().strip("$") for part in parts)


def _atom(value: Any) -> str | int | float | None:
    """Text that is not blank, or a finite number; None for anything else."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
