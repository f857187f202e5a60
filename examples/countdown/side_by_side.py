"""Runs stages side by side, each in a process forked from one that has imported everything already.

Importing torch and Megatron takes as long as ten steps of the Countdown model. ``Workers`` starts a few
processes of this file (``python side_by_side.py CORE ...``) on cores of their own; each imports once, and
then forks for every command that it is given.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Protocol

from stages import ROOT, Progress, Stage, StageFailed, short

from apo_megatron.telemetry.progress import duration

PRELOADED = ("apo_megatron.train", "apo_megatron.sft", "apo_megatron.evaluate")


class Executor(Protocol):
    """Runs commands, a few at a time."""

    @property
    def num_slots(self) -> int: ...

    def start(self, slot: int, command: Sequence[str], log: Path, limit: int) -> None:
        """Start ``command``, all output into ``log``; after ``limit`` seconds it is killed by SIGALRM."""

    def wait(self) -> tuple[int, int]:
        """The next slot whose command has ended, and its exit code (negative: of which signal)."""


class Workers:
    """``num_slots`` processes that fork; enter it with ``with``. They work on the CPU, one thread a core."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Workers:
        cores = sorted(os.sched_getaffinity(0))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        for slot in range(self.num_slots):
            own = cores[slot :: self.num_slots] or [cores[slot % len(cores)]]
            process = subprocess.Popen(
                [sys.executable, __file__, *map(str, own)],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it with all that it has forked
            )
            self._processes.append(process)
            self._selector.register(_pipe(process.stdout), selectors.EVENT_READ, slot)
        return self

    def start(self, slot: int, command: Sequence[str], log: Path, limit: int) -> None:
        """See Executor."""
        pipe = _pipe(self._processes[slot].stdin)
        with suppress(BrokenPipeError):  # it has ended: wait() says so
            pipe.write(json.dumps([list(command), str(log), limit]) + "\n")
            pipe.flush()

    def wait(self) -> tuple[int, int]:
        """See Executor. Raises StageFailed where a worker itself is gone."""
        key, _ = self._selector.select()[0]
        answer = _pipe(self._processes[key.data].stdout).readline()
        if not answer:
            raise StageFailed(f"worker {key.data} has ended; its messages are above", 1)
        return key.data, int(answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            # Not SIGTERM: a run would save its state, and here one that has not ended is begun anew.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with suppress(BrokenPipeError):  # what could not be written to one that had ended
                _pipe(process.stdin).close()
            _pipe(process.stdout).close()
        self._selector.close()


def run_all(
    stages: Sequence[Stage],
    executor: Executor,
    progress: Progress,
    fresh: bool,
    describe: Callable[[Stage], str] = lambda stage: "",
) -> dict[Path, str]:
    """Run those of ``stages`` that have not finished before; folder -> why, of those that failed.

    ``describe`` adds to the line of a finished stage.
    """
    waiting: deque[Stage] = deque()
    for stage in stages:
        if stage.is_finished() and not fresh:
            progress.finish(stage.kind, None)
        else:
            waiting.append(stage)
    if len(waiting) < len(stages):
        print(f"already there: {len(stages) - len(waiting)} of {len(stages)}")
    failures: dict[Path, str] = {}
    running: dict[int, tuple[Stage, float]] = {}
    free = list(range(executor.num_slots))
    while waiting or running:
        while waiting and free:
            stage = waiting.popleft()
            shutil.rmtree(stage.folder, ignore_errors=True)
            log_path(stage).parent.mkdir(parents=True, exist_ok=True)
            slot = free.pop(0)
            running[slot] = stage, time.monotonic()
            executor.start(slot, stage.command, log_path(stage), stage.limit)
        slot, code = executor.wait()
        free.append(slot)
        stage, started = running.pop(slot)
        seconds = time.monotonic() - started
        problem = _problem(stage, code)
        if problem is None:
            stage.write_stamp(seconds)
            said = describe(stage)
        else:
            failures[stage.folder] = said = problem
        counter = progress.counter
        progress.finish(stage.kind, None if problem else seconds)
        print(
            f"{counter} {stage.title}: {'' if problem is None else 'FAILED, '}{duration(seconds)}"
            f"{f' | {said}' if said else ''} | about {duration(progress.seconds_left)} left",
            flush=True,
        )
    return failures


def log_path(stage: Stage) -> Path:
    """What the stage printed, beside its folder."""
    return stage.folder.with_name(f"{stage.folder.name}.log")


def _problem(stage: Stage, code: int) -> str | None:
    """Why ``stage``, which has ended with ``code``, is a failure; None where it is none."""
    if code == 0:
        missing = stage.missing()
        return f"ended without writing {', '.join(missing)}" if missing else None
    if code == -signal.SIGALRM:
        return f"had not ended after {duration(stage.limit)}, its limit (see {short(log_path(stage))})"
    if code < 0:
        return f"killed by {signal.Signals(-code).name} (see {short(log_path(stage))})"
    log = log_path(stage)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or [line for line in lines if line.strip()] or [f"exit code {code}"])[-1]
    return f"{said.strip()} (see {short(log)})"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "Popen was asked for it"
    return pipe


# --- the worker ------------------------------------------------------------------------------------


def serve(cores: Sequence[int]) -> None:
    """Fork for each ``[command, log, limit]`` (JSON, a line of stdin); its exit code is a line of stdout."""
    os.sched_setaffinity(0, cores)
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # a fork that collected what was imported would copy all of it
    for line in sys.stdin:
        command, log, limit = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(command, log, limit)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(command: Sequence[str], log: str, limit: int) -> NoReturn:
    """Run ``python -m MODULE ...`` or ``python SCRIPT ...`` in this process, and end it."""
    signal.alarm(limit)
    output, nothing = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    print(f"$ {shlex.join(command)}", flush=True)
    try:
        if command[1] == "-m":
            code = importlib.import_module(command[2]).main(command[3:])
        else:
            sys.argv = list(command[1:])
            runpy.run_path(command[1], run_name="__main__")
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down the interpreter takes longer than a short run


if __name__ == "__main__":
    serve([int(core) for core in sys.argv[1:]])
