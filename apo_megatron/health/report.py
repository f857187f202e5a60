"""What a stalled run leaves in run_dir/hang, for people: summary.txt, and rank_NNNNN.txt from every rank."""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from apo_megatron.health.diagnosis import Diagnosis, StateOf, idle_seconds
from apo_megatron.health.stamp import Stamp

_ADVICE = """\
What to do
- The stacks of every rank are in the other files of this folder; those of a rank without one, as of its last
  sign of life, in ../health. The rank that is behind says why; the others only wait for it.
- A process that was stopped or is gone: look at its host (dmesg, out-of-memory killer, the scheduler's log).
- All ranks in the same collective: look at the network, and run again with NCCL_DEBUG=INFO.
- A place that only needs longer: raise parallel.stall_minutes, and parallel.timeout_minutes above it.
- The last checkpoint is as it was: give the same command with --resume auto to go on from it."""


def rank_report(stamp: Stamp) -> str:
    """Everything about this rank: its place, its collectives by group, the stacks of its threads."""
    lines = [
        f"rank {stamp.rank}, host {stamp.host}, pid {stamp.pid}",
        f"in {stamp.place}; no progress for {stamp.idle_seconds:.0f} s",
        f"last collective: {stamp.last_collective_text}",
        "collectives issued:",
        *(f"  {group.count:>8}  {group.label}" for group in stamp.groups.values()),
    ]
    frames = sys._current_frames()
    for thread in threading.enumerate():  # the main thread is the first
        frame = frames.get(thread.ident or 0)
        if frame is not None and thread is not threading.current_thread():
            lines += ["", f"thread {thread.name}, innermost frame first:"]
            lines += [f"  {line}" for line in stack_lines(frame)]
    return "\n".join(lines) + "\n"


def stack_lines(innermost: FrameType) -> list[str]:
    """``file:line in function: source`` of a frame and its callers."""
    return [_frame_line(frame) for frame in _frames(innermost)]


def stack_position(innermost: FrameType) -> int:
    """Differs where the thread has got on. A loop that polls sleeps at one place whenever one looks."""
    return hash(tuple((frame.f_code, frame.f_lasti) for frame in _frames(innermost)))


def _frames(innermost: FrameType) -> Iterator[FrameType]:
    frame: FrameType | None = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back


def _frame_line(frame: FrameType) -> str:
    path, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(path, line).strip()
    return f"{path}:{line} in {frame.f_code.co_qualname}" + (f": {source}" if source else "")


def summary(
    stamps: Sequence[Stamp | None],
    diagnosis: Diagnosis,
    now: float,
    silent_after: float,
    state_of: StateOf,
) -> str:
    """The report on the whole run, from the last stamps in rank order."""
    idle = min((idle_seconds(stamp, now, silent_after) for stamp in stamps if stamp is not None), default=0.0)
    title = f"The run has stalled: no rank has made progress for {idle:.0f} s."
    header = (
        *("rank", "host", "pid", "process", "sign of life", "progress", "collectives"),
        *("place", "last collective"),
    )
    rows = [_row(rank, stamp, now, silent_after, state_of) for rank, stamp in enumerate(stamps)]
    return "\n".join([title, "", *diagnosis.sentences, "", *_table([header, *rows]), "", _ADVICE]) + "\n"


def _row(
    rank: int, stamp: Stamp | None, now: float, silent_after: float, state_of: StateOf
) -> tuple[str, ...]:
    if stamp is None:
        return (str(rank), *("?",) * 3, "never", "?", "?", "?", "?")
    state = state_of(stamp)
    return (
        str(rank),
        stamp.host,
        str(stamp.pid),
        "gone" if state is None else state or "?",
        f"{max(0.0, now - stamp.time):.0f} s ago",
        f"{idle_seconds(stamp, now, silent_after):.0f} s ago",
        str(stamp.num_collectives),
        str(stamp.place),
        stamp.last_collective_text,
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
