"""What the signals of a scheduler do to a run."""

from __future__ import annotations

import os
import signal

import pytest

from apo_megatron.telemetry import stop_request
from apo_megatron.telemetry.stop_request import StopRequest


def test_a_repetition_is_the_same_request_and_a_later_one_acts_as_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now)
    usual: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: usual.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            now = 4.0  # torchrun passes on what the scheduler has sent to all
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.received, usual) == ("SIGTERM", [])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (stop.received, usual) == ("SIGUSR1", [])
            now = 6.0
            os.kill(os.getpid(), signal.SIGTERM)
            assert usual == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert usual == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
