"""A thread of every rank that writes signs of life, and ends a run in which nothing moves any more.

A rank makes progress where its activity, its number of collectives or the place of its main thread in the
program has changed since the last look. Nobody reads the others' stamps but the lowest rank that is alive,
once it stands still itself; where all others do, too, it declares the stall by making run_dir/hang. Then
every rank writes its report there, the lowest of those that did writes the summary, and all end.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from apo_megatron.files import write_atomically
from apo_megatron.health import activity
from apo_megatron.health.activity import Place
from apo_megatron.health.diagnosis import diagnose, idle_seconds, is_silent
from apo_megatron.health.processes import STOPPED, kill, process_start, process_state
from apo_megatron.health.report import rank_report, stack_lines, stack_position, summary
from apo_megatron.health.stamp import (
    HEALTH_FOLDER,
    CollectiveCount,
    LastCollective,
    PlaceFile,
    Stamp,
    read_stamp,
    write_stamp,
)
from apo_megatron.parallel import collective_log
from apo_megatron.telemetry.command import EXIT_STALLED

BEAT_SECONDS = 10.0  # between two signs of life, or an eighth of the patience
SILENT_SECONDS = 60.0  # without a sign of life, or half of the patience
# Before a collective of this rank runs into its time-out, whatever the others do.
MARGIN_SECONDS = 60.0
REPORT_SECONDS = 5.0  # and two beats: how long ranks wait for the others' reports
HANG_FOLDER, SUMMARY_FILE = "hang", "summary.txt"
_POLL_SECONDS = 0.1
_REPORT_NAME = re.compile(r"rank_(\d+)\.txt")


class Watchdog:
    """Of one rank; use it as a context manager around the run, on the main thread.

    ``stall_minutes`` without progress of any rank end the run with EXIT_STALLED, and so does a rank without
    any until shortly before ``timeout_minutes``. 0: signs of life only.
    """

    def __init__(
        self, run_dir: Path, rank: int, world: int, stall_minutes: float, timeout_minutes: float
    ) -> None:
        self._run_dir, self._hang_dir = run_dir, run_dir / HANG_FOLDER
        self._rank, self._world = rank, world
        self._patience = 60 * stall_minutes
        self._last_call = 60 * timeout_minutes - min(
            MARGIN_SECONDS, 60 * (timeout_minutes - stall_minutes) / 2
        )
        self._beat_seconds, self._silent_after = BEAT_SECONDS, SILENT_SECONDS
        if stall_minutes:
            self._beat_seconds = min(BEAT_SECONDS, self._patience / 8)
            self._silent_after = min(SILENT_SECONDS, self._patience / 2)
        self._report_seconds = 2 * self._beat_seconds + REPORT_SECONDS
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._process_start = process_start(self._pid) or 0
        self._main_thread = threading.main_thread().ident or 0
        self._position: object = None
        self._last_look = self._last_progress = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> Watchdog:
        collective_log.log.clear()
        # Rank 0 has made it; network file systems remember that it was not there, until one tries to make it.
        (self._run_dir / HEALTH_FOLDER).mkdir(parents=True, exist_ok=True)
        doing, self._place_file = activity.current, PlaceFile(self._run_dir, self._rank)
        doing.listener = lambda: self._place_file.write(doing)
        doing.restart()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        activity.current.listener = None
        self._place_file.close()
        self._ending.set()
        self._thread.join(timeout=self._report_seconds)  # it may write to a file system that hangs
        if not self._thread.is_alive():
            self._write(replace(self._stamp(), has_ended=True))

    def _watch(self) -> None:
        while not self._ending.wait(self._beat_seconds):
            stamp = self._look()
            if self._patience and stamp.idle_seconds >= self._patience / 2:
                try:
                    is_over = self._is_declared() or self._has_stalled(stamp)
                except OSError:  # the run directory does not answer: it may the next time
                    continue
                if is_over:
                    self._end_run(stamp)

    # Signs of life

    def _look(self) -> Stamp:
        """Whether there was progress since the last look; the sign of life, which is written."""
        now, doing, log = time.monotonic(), activity.current, collective_log.log
        main = sys._current_frames()[self._main_thread]
        position = (doing.values(), log.num_issued, stack_position(main))
        was_frozen = now - self._last_look > self._silent_after  # all of it, so that it looks at once
        if position != self._position or was_frozen:
            self._last_progress = now
        self._position = position
        stamp = self._stamp()
        self._write(stamp)
        self._last_look = time.monotonic()  # the write may have waited for its file system
        return stamp

    def _stamp(self) -> Stamp:
        doing, log = activity.current, collective_log.log
        last = log.last
        return Stamp(
            rank=self._rank,
            host=self._host,
            pid=self._pid,
            process_start=self._process_start,
            time=time.time(),
            idle_seconds=time.monotonic() - self._last_progress,
            place=Place(**doing.values()),
            num_collectives=log.num_issued,
            last_collective=None if last is None else LastCollective(last[0], last[1].key, last[2]),
            groups={
                group.key: CollectiveCount(group.label, group.ranks, group.count)
                for group in list(log.groups.values())
            },
            stack=tuple(stack_lines(sys._current_frames()[self._main_thread])),
        )

    def _write(self, stamp: Stamp) -> None:
        try:
            write_stamp(self._run_dir, stamp)
        except OSError:  # a full disk ends a run where it matters, not here
            pass

    # The stall

    def _is_declared(self) -> bool:
        # Listed, not asked for by name: network file systems remember for a minute that a name was not there.
        return HANG_FOLDER in os.listdir(self._run_dir)

    def _has_stalled(self, own: Stamp) -> bool:
        if own.idle_seconds >= self._last_call:
            return True
        if own.idle_seconds < self._patience or self._has_lower_rank():
            return False
        now = time.time()
        others = (read_stamp(self._run_dir, rank) for rank in range(self._world) if rank != self._rank)
        return all(
            other is None or other.has_ended or idle_seconds(other, now, self._silent_after) >= self._patience
            for other in others
        )

    def _has_lower_rank(self) -> bool:
        """One that is alive, so that it looks at the others."""
        lower = (read_stamp(self._run_dir, rank) for rank in range(self._rank))
        return any(
            stamp is not None and not stamp.has_ended and not self._is_silent(stamp) for stamp in lower
        )

    def _is_silent(self, stamp: Stamp) -> bool:
        return is_silent(stamp, time.time(), self._silent_after)

    def _end_run(self, own: Stamp) -> None:
        """Write the report, wait for the others' and the summary, end the process."""
        try:
            self._hang_dir.mkdir(exist_ok=True)
            write_atomically(self._hang_dir / f"rank_{self._rank:05d}.txt", rank_report(own))
            if self._has_lower_rank():
                self._wait_until(self._has_summary)
            # A lower rank may still be moving, where a time-out is near.
            if not self._has_summary() and min(self._reporting()) == self._rank:
                self._write_summary(own)
        except OSError as error:
            _say(f"rank {self._rank}: the report could not be written ({error}):\n{rank_report(own)}")
        os._exit(EXIT_STALLED)

    def _write_summary(self, own: Stamp) -> None:
        now = own.time  # nobody gives signs of life while he reports
        read = [own if rank == self._rank else read_stamp(self._run_dir, rank) for rank in range(self._world)]
        alive = {
            stamp.rank
            for stamp in read
            if stamp is not None and not stamp.has_ended and not is_silent(stamp, now, self._silent_after)
        }
        self._wait_until(lambda: alive <= self._reporting())
        stamps = [stamp if stamp is None else self._newest(stamp) for stamp in read]
        diagnosis = diagnose(stamps, now, self._silent_after, self._state_of)
        text = summary(stamps, diagnosis, now, self._silent_after, self._state_of)
        write_atomically(self._hang_dir / SUMMARY_FILE, text)
        _say(f"{text}\nThis is also in {self._hang_dir / SUMMARY_FILE}.")
        for stamp in stamps:
            # One that is stopped could not act on a launcher's SIGTERM.
            if stamp is not None and self._state_of(stamp) == STOPPED:
                kill(stamp.pid, stamp.process_start)

    def _newest(self, stamp: Stamp) -> Stamp:
        return stamp if stamp.rank == self._rank else read_stamp(self._run_dir, stamp.rank) or stamp

    def _state_of(self, stamp: Stamp) -> str | None:
        return "" if stamp.host != self._host else process_state(stamp.pid, stamp.process_start)

    def _reporting(self) -> set[int]:
        """The ranks whose reports are there."""
        found = (_REPORT_NAME.fullmatch(name) for name in os.listdir(self._hang_dir))
        return {int(match.group(1)) for match in found if match is not None}

    def _has_summary(self) -> bool:
        return SUMMARY_FILE in os.listdir(self._hang_dir)

    def _wait_until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._report_seconds
        while not is_true() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def put_away(run_dir: Path) -> None:
    """Make room for the signs of life and the reports of a new run; the reports of earlier ones are kept."""
    shutil.rmtree(run_dir / HEALTH_FOLDER, ignore_errors=True)
    (run_dir / HEALTH_FOLDER).mkdir(exist_ok=True)
    if (run_dir / HANG_FOLDER).exists():
        numbers = itertools.count(1)
        free = (
            run_dir / f"{HANG_FOLDER}_{n}" for n in numbers if not (run_dir / f"{HANG_FOLDER}_{n}").exists()
        )
        (run_dir / HANG_FOLDER).rename(next(free))


def _say(text: str) -> None:
    stream = sys.__stderr__  # that of the main thread may hold back what is printed, or hold a lock
    if stream is not None:
        stream.write(f"{text}\n")
        stream.flush()
