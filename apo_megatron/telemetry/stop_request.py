"""Signals that ask a run to stop in good order."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# SIGTERM: a scheduler (Slurm, torchrun) takes the machine away. SIGUSR1: what one asks for in advance.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler that signals all processes of a job signals torchrun, too, which passes it on: one request.
_SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """Inside the ``with`` block these signals are noted in ``received``. One that comes again later than
    within five seconds acts as usual."""

    def __init__(self) -> None:
        self.received: str | None = None  # the name of the signal
        self._first: dict[int, float] = {}  # when each came
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._first.setdefault(number, now) > _SAME_REQUEST_SECONDS:
            signal.signal(number, self._previous[number])
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
