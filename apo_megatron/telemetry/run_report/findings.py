"""What to look at in a run, in words: every check is a pure function of what was read from its directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apo_megatron.telemetry.run_report.folders import RunRecord
from apo_megatron.telemetry.series import Floats

PROBLEM, NOTE = "problem", "note"


@dataclass(frozen=True)
class Finding:
    """``advice`` says what to do, ``read`` where more is written (a page of docs/)."""

    severity: str  # problem: look now; note: good to know
    text: str
    advice: str
    read: str


Check = Callable[[RunRecord], Iterator[Finding]]


def find(run: RunRecord, checks: Sequence[Check]) -> list[Finding]:
    """What ``checks`` find, problems first."""
    found = [finding for check in checks for finding in check(run)]
    return sorted(found, key=lambda finding: finding.severity != PROBLEM)


def ends(values: Floats) -> tuple[float, float]:
    """Means of the first and of the last fifth of the values, at least one of each."""
    length = max(1, len(values) // 5)
    return float(values[:length].mean()), float(values[-length:].mean())


def late(run: RunRecord, key: str) -> float | None:
    """Mean of a metric over the last fifth of the steps that have it; None where none has."""
    _, values = run.values(key)
    return ends(values)[1] if len(values) else None


def standard_error(values: Floats) -> float:
    """Of the mean; infinite for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
