"""Waiting that is never silent and never without end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from apo_megatron.errors import RunInterrupted, TrainingError
from apo_megatron.launch.stop_signals import StopSignals
from apo_megatron.telemetry.progress import duration

FIRST_LINE_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 10.0


class Waiting:
    """A period of waiting, of at most ``minutes``."""

    def __init__(self, stop: StopSignals, say: Callable[[str], None], minutes: float) -> None:
        self._stop, self._say, self._limit = stop, say, 60 * minutes
        self._started = time.monotonic()
        self._next_line = FIRST_LINE_SECONDS

    def step(self, lines: Sequence[str]) -> None:
        """Call it often: now and then it shows ``lines``, what is waited for.

        Raises RunInterrupted after a signal, TrainingError with ``lines`` when the time is over.
        """
        if self._stop.count:
            raise RunInterrupted(f"{self._stop.name} received while waiting {lines[0]}")
        seconds = time.monotonic() - self._started
        if seconds > self._limit:
            text = "\n".join(lines)
            raise TrainingError(f"gave up after {duration(seconds)} (--wait-minutes), waiting {text}")
        if seconds > self._next_line:
            self._next_line = seconds + SECONDS_BETWEEN_LINES
            first, *rest = lines
            self._say("\n".join([f"waiting {duration(seconds)} of {duration(self._limit)} {first}", *rest]))
