"""What Linux knows of a process on this host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

STATES = {
    "R": "runs",
    "S": "waits",
    "D": "waits for a disk or a device and cannot be interrupted",
    "T": "is stopped by a signal",
    "t": "is stopped by a debugger",
    "Z": "has died, its parent has not noticed yet",
    "X": "has died",
    "I": "is idle",
}
STOPPED = "T"


def process_start(pid: int) -> int | None:
    """When the process began, in clock ticks after the host's boot; None where there is none."""
    fields = _fields(pid)
    return None if fields is None else int(fields[19])


def process_state(pid: int, start: int) -> str | None:
    """A letter of STATES; None where the process with this number that began at ``start`` is gone."""
    fields = _fields(pid)
    return fields[0] if fields is not None and int(fields[19]) == start else None


def kill(pid: int, start: int) -> None:
    """SIGKILL, also to one that is stopped; no effect where it is gone."""
    if process_state(pid, start) is None:
        return
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone since, or another user's with the same number
        pass


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat behind the name of the program, which may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
