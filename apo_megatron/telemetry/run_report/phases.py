"""Where the time of a run went, phase by phase."""

from __future__ import annotations

from typing import Any

import numpy as np

from apo_megatron.telemetry.run_report.folders import RunRecord
from apo_megatron.telemetry.series import Floats, rounded

NUM_BARS = 60
SMALL_PHASE = 0.01  # of the time without evaluations: drawn with the others
OTHER, EVALUATION = "other", "evaluation"
_NO_PHASES = {"time/step", "time/waiting_for_engine"}  # everything; a part of rollout


def phase_contents(run: RunRecord) -> dict[str, Any] | None:
    """``bars``: mean seconds per step of each of ``names``, over the steps of each of ``ranges`` (first and
    last), without evaluations; ``table``: [phase, seconds in all, per step, share] of every phase."""
    if not any("time/step" in line for line in run.history):
        return None
    seconds = _seconds_by_phase(run)
    total = sum(float(values.sum()) for values in seconds.values()) or 1.0
    own = {name: values for name, values in seconds.items() if name not in (EVALUATION, OTHER)}
    least = SMALL_PHASE * sum(float(values.sum()) for values in (*own.values(), seconds[OTHER]))
    drawn = {name: values for name, values in own.items() if values.sum() >= least}
    rest = sum((values for name, values in own.items() if name not in drawn), seconds[OTHER])
    edges = np.linspace(0, len(run.history), min(NUM_BARS, len(run.history)) + 1).astype(int)
    stretches = list(zip(edges[:-1], edges[1:], strict=True))
    return {
        "names": [*drawn, OTHER],
        "ranges": [
            [int(run.history[low]["step"]), int(run.history[high - 1]["step"])] for low, high in stretches
        ],
        "bars": [
            rounded(np.array([values[low:high].mean() for low, high in stretches]))
            for values in (*drawn.values(), rest)
        ],
        "table": [
            [name, *rounded(np.array([values.sum(), values.mean(), values.sum() / total]))]
            for name, values in sorted(seconds.items(), key=lambda row: -row[1].sum())
        ],
    }


def _seconds_by_phase(run: RunRecord) -> dict[str, Floats]:
    """Phase -> seconds of each line of the history; ``other`` is what no phase took."""
    names = sorted({key for line in run.history for key in line if key.startswith("time/")} - _NO_PHASES)
    seconds = {name.removeprefix("time/").replace("_", " "): _column(run, name) for name in names}
    in_phases = sum(seconds.values(), np.zeros(len(run.history)))
    return {**seconds, OTHER: np.maximum(_column(run, "time/step") - in_phases, 0.0)}


def _column(run: RunRecord, name: str) -> Floats:
    return np.nan_to_num(np.array([line.get(name, 0.0) for line in run.history], dtype=float))
