"""How a run is, in words, from the signs that it has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apo_megatron.telemetry.series import Floats

# Without a sign for so long a run counts as silent: the longest of these.
SILENT_SECONDS = 300.0
SILENT_STEPS = 10.0  # times the 95th percentile of its steps
SILENT_AT_START_SECONDS = 1800.0  # no step yet: weights load, servers start


@dataclass(frozen=True)
class Signs:
    """What a run directory tells about the process."""

    last_step: int  # 0: none is finished
    num_steps: int | None
    step_seconds: Floats  # [n], of the finished steps
    outcome: Mapping[str, Any] | None  # run_dir/outcome.json
    has_hung: bool
    is_evaluated: bool  # at its end, or it has nothing to evaluate
    seconds_since_sign: float


@dataclass(frozen=True)
class Status:
    kind: str  # finished, interrupted, failed, hung, silent, running, starting
    text: str


def status_of(signs: Signs) -> Status:
    """The first that holds: how the run itself ended, a report of a hang, all steps done, silence, life."""
    at = f"step {signs.last_step:,}" + (f" of {signs.num_steps:,}" if signs.num_steps else "")
    message = str((signs.outcome or {}).get("message", ""))
    kind = (signs.outcome or {}).get("outcome")
    if signs.has_hung:
        return Status("hung", f"stalled at {at}: one or more ranks stopped moving")
    if kind in ("interrupted", "failed"):
        verb = "stopped by a signal" if kind == "interrupted" else "failed"
        return Status(str(kind), f"{verb} after {at}" + (f": {message}" if message else ""))
    is_done = signs.num_steps is not None and signs.last_step >= signs.num_steps and signs.is_evaluated
    if kind == "finished" or is_done:
        return Status(
            "finished", f"finished: {at}, {time_in_words(float(signs.step_seconds.sum()))} in steps"
        )
    since = time_in_words(signs.seconds_since_sign)
    if signs.seconds_since_sign > silent_after(signs):
        where = f"after {at}" if signs.last_step else "before the first step was finished"
        return Status(
            "silent",
            f"no sign for {since}, {where}: it stands still, or ended without a word (killed, node lost)",
        )
    if not signs.last_step:
        return Status("starting", f"started, no step is finished yet; last sign {since} before this page")
    left = ""
    if signs.num_steps:
        left = (
            f", about {time_in_words(_usual(signs.step_seconds) * (signs.num_steps - signs.last_step))} left"
        )
    return Status("running", f"running: {at}{left}; last sign {since} before this page")


def silent_after(signs: Signs) -> float:
    """Seconds without a sign after which a run is called silent."""
    if not signs.last_step or not len(signs.step_seconds):
        return SILENT_AT_START_SECONDS
    return max(SILENT_SECONDS, SILENT_STEPS * float(np.percentile(signs.step_seconds, 95)))


def time_in_words(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _usual(step_seconds: Floats) -> float:
    return float(np.mean(step_seconds[-32:])) if len(step_seconds) else 0.0
