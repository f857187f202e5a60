"""How an attempt ended: which rank failed first, what it said, and how to go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.errors import TrainingError
from apo_megatron.launch.placement import RankPlace
from apo_megatron.telemetry.command import EXIT_INTERRUPTED, EXIT_USER_ERROR

NUM_LAST_LINES = 20
_TAIL_BYTES = 65536
_ENDED_IN_ORDER = (0, EXIT_INTERRUPTED)


class RunFailed(TrainingError):
    """A rank failed; ``exit_code`` is what the launcher ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class RankEnd:
    """A rank that runs no more. ``code``: of its process, -N after signal N; None where ``problem`` says
    how it was lost. ``node_is_silent``: it may run on, cut off from us."""

    place: RankPlace
    code: int | None
    problem: str = ""
    node_is_silent: bool = False

    @property
    def is_failure(self) -> bool:
        return self.code not in _ENDED_IN_ORDER

    @property
    def exit_code(self) -> int:
        """What a user's command line ends with because of it."""
        return EXIT_USER_ERROR if self.code == EXIT_USER_ERROR else 1

    def describe(self) -> str:
        where = f"rank {self.place.rank} on node {self.place.node.label}"
        if self.code is None:
            return f"{where} {self.problem}"
        if self.code < 0:
            return f"{where} was ended by {signal.Signals(-self.code).name}"
        return f"{where} ended with exit code {self.code}"


def first_failure(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Of ``ends``, in the order in which they were seen, the one that the others followed from.

    The others see their connections break within milliseconds. So one that was lost or killed comes before
    one that could still report something.
    """
    failures = [end for end in ends if end.is_failure]
    killed = [end for end in failures if end.code in (None, -signal.SIGKILL)]
    return next(iter(killed or failures), None)


class LogTail:
    """What is appended to a log from now on, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def new_text(self, to_end: bool = False) -> str:
        """Since the last call; ``to_end``: also what is no whole line yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                self._rest += file.read()
                self._position = file.tell()
        except FileNotFoundError:
            return ""
        cut = len(self._rest) if to_end else self._rest.rfind(b"\n") + 1
        text, self._rest = self._rest[:cut], self._rest[cut:]
        return text.decode("utf-8", errors="replace")


def last_lines(path: Path) -> list[str]:
    """The end of a log, without empty lines; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-NUM_LAST_LINES:]
