"""Worker processes for judging that may hang, crash or eat memory: warm, reused, killed at a deadline.

What runs here is the same whatever the number of workers: a task is a pure function of its arguments, and its
result is None where the deadline or a crash ended it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from apo_megatron.errors import RewardError

T = TypeVar("T")

MEMORY_LIMIT = 4 * 2**30  # bytes that tasks of a worker may allocate: beyond them, MemoryError
START_SECONDS = 120.0  # within which the workers must have started
START_ATTEMPTS = 3
RESTART_SECONDS = 10.0  # on top of a deadline, until a task must have ended: killed workers are replaced
_NO_MAIN = ModuleSpec("apo_megatron.__main__", None)  # multiprocessing imports no main module of such a name
_main_lock = threading.Lock()

logger = logging.getLogger(__name__)


class WorkerPool:
    """``num_workers`` processes that run tasks, each with a deadline of ``timeout`` seconds.

    They start with the first task, import ``preload`` (modules that tasks need), and live until ``close`` or
    the end of this process, killed or not. They are spawned, so that they share no lock, no device and no
    communicator with the trainer, and do not import its main module, so that they hold no torch.
    """

    def __init__(self, num_workers: int, timeout: float, preload: Sequence[str] = ()) -> None:
        self._num_workers = num_workers
        self._timeout = timeout
        self._preload = tuple(preload)
        self._pool: ProcessPool | None = None
        self._stop: Callable[[], object] = _nothing

    def map(self, function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> list[T | None]:
        """``function(*task)`` for each task, in order; None where it was killed at its deadline or crashed.

        ``function`` is a module's own. All takes at most about ceil(tasks / num_workers) x the deadline.
        Raises RewardError where workers cannot be started, or where the function raises.
        """
        if not tasks:
            return []
        pool = self._running_pool()
        try:
            futures: list[Future[T]] = [
                pool.schedule(_run_task, (function, task, self._timeout), timeout=self._timeout)
                for task in tasks
            ]
        except RuntimeError:  # all workers were killed since it started
            logger.warning("reward workers are lost, %d answers are not judged: replaced", len(tasks))
            self.close()
            return [None] * len(tasks)
        unfinished: set[Future[T]] = set(futures)
        while unfinished:
            done, unfinished = wait(unfinished, timeout=self._timeout + RESTART_SECONDS)
            if not done:  # the pool itself hangs: a worker was killed while it held the lock of its pipe
                logger.warning("reward workers hang, %d answers are not judged: replaced", len(unfinished))
                self.close()
                break
        return [None if future in unfinished else _result(future) for future in futures]

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and self._pool.active:
            return self._pool
        for attempt in range(1, START_ATTEMPTS + 1):
            self.close()
            self._pool = pool = self._new_pool()
            self._stop = weakref.finalize(self, _stop_pool, pool)  # also at the end of the interpreter
            try:
                pool.schedule(os.getpid).result(timeout=START_SECONDS)
                return pool
            except (TimeoutError, ProcessExpired, BrokenProcessPool) as error:
                self.close()
                if attempt == START_ATTEMPTS:
                    raise RewardError(
                        f"reward workers could not be started ({type(error).__name__}: {error}): see their "
                        "messages above, and whether math-verify is installed"
                    ) from error
        raise AssertionError("the last attempt returns or raises")

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            self._num_workers,
            initializer=_prepare_worker,
            initargs=(self._preload,),
            context=_TorchFreeContext(),
        )

    def close(self) -> None:
        """End the workers. The next ``map`` starts new ones."""
        self._stop()
        self._pool, self._stop = None, _nothing


class _TorchFreeProcess(SpawnProcess):
    """A spawned process that does not import its parent's main module, a trainer with torch and Megatron."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        with _main_lock:
            spec, main.__spec__ = main.__spec__, _NO_MAIN
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                main.__spec__ = spec


class _TorchFreeContext(SpawnContext):
    Process = _TorchFreeProcess


def _result(future: Future[T]) -> T | None:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, TimeoutError | ProcessExpired | BrokenProcessPool):
        return None
    raise RewardError(f"judging failed in a reward worker: {type(error).__name__}: {error}") from error


def _nothing() -> None:
    """There is no pool to stop."""


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _prepare_worker(preload: Sequence[str]) -> None:
    """In the worker, before its first task."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends it inside C code, too, where no handler would run
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in preload:
        importlib.import_module(name)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])  # libraries reserve more than they use
    limit = num_pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


def _run_task(function: Callable[..., T], task: tuple[Any, ...], timeout: float) -> T:
    # A second deadline, in CPU time, kept by the kernel: for a worker whose trainer is gone.
    signal.setitimer(signal.ITIMER_PROF, 2 * timeout)
    try:
        return function(*task)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
