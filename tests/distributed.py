"""Runs a function on several gloo processes.

The processes are forked from a server that imports torch, Megatron and this package once per session, so a
rank costs milliseconds instead of seconds.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# None of these imports starts a thread, so the server may be forked. What does start one (torch.distributed,
# the first parallel operation) happens in the ranks, as does the CPU adapter.
_PRELOADED = [
    "pytest",  # the main module of the session, which every new process imports
    "tests.distributed",
    "torch._dynamo",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
    "apo_megatron.train",
    "apo_megatron.sft",
    "apo_megatron.evaluate",
]
_WITHOUT_GPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def run_distributed(
    world_size: int, target: str, payload: dict[str, Any], timeout: float = 900.0, use_gpu: bool = False
) -> list[Any]:
    """Call ``module:function`` with ``payload`` in every rank of a new world; the results by rank.

    Payload and results hold plain containers, numbers, strings and CPU tensors. A rank that raises fails the
    test with its traceback. Without ``use_gpu`` the ranks see no GPU, so they run on gloo everywhere.
    """
    with DistributedRun(world_size, target, payload, use_gpu) as run:
        return run.results(timeout)


class DistributedRun:
    """Ranks of a new world that run beside the test; none outlives the ``with`` block."""

    def __init__(self, world_size: int, target: str, payload: dict[str, Any], use_gpu: bool = False) -> None:
        self._target = target
        self._folder = tempfile.TemporaryDirectory()
        torch.save(payload, self._path("payload.pt"))
        environment = {
            **os.environ,
            **({"OMP_NUM_THREADS": "1"} if use_gpu else _WITHOUT_GPU),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        if not use_gpu:
            _start_server()
        # CUDA does not survive a fork: ranks with a GPU start from nothing.
        context: Any = multiprocessing.get_context("spawn" if use_gpu else "forkserver")
        self._processes = [
            context.Process(
                target=_rank_main,
                args=(target, self._folder.name, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}),
            )
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def results(self, timeout: float = 900.0) -> list[Any]:
        """Wait for all ranks; what they returned. AssertionError with the logs of those that have not."""
        exit_codes = self.exit_codes(timeout)
        failed = [rank for rank, code in enumerate(exit_codes) if code != 0]
        if failed:
            logs = "\n".join(
                f"--- rank {rank} ({exit_codes[rank]})\n{self.log(rank)[-4000:]}" for rank in failed
            )
            raise AssertionError(f"{self._target} failed on ranks {failed}\n{logs}")
        paths = [self._path(f"result{rank}.pt") for rank in range(len(self._processes))]
        return [torch.load(path, weights_only=True) for path in paths]

    def exit_codes(self, timeout: float) -> list[int | None]:
        """Wait until all ranks have ended or one has failed. -N: ended by signal N, None: still running."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.exitcode for process in self._processes]
            running = [p.sentinel for p, code in zip(self._processes, codes, strict=True) if code is None]
            if not running or any(codes) or time.monotonic() > deadline:
                return codes
            connection.wait(running, deadline - time.monotonic())

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to ``rank``; no effect where it has ended."""
        process = self._processes[rank]
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)

    def log(self, rank: int) -> str:
        """What ``rank`` has printed so far."""
        path = self._path(f"log{rank}")
        return path.read_text(errors="replace") if path.exists() else ""

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, name)

    def __enter__(self) -> DistributedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _start_server() -> None:
    """Start the process that ranks are forked from, where it does not run yet."""
    forkserver.set_forkserver_preload(_PRELOADED)
    outside = dict(os.environ)
    os.environ.update(_WITHOUT_GPU)  # they must be set before torch is imported
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(outside)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(target: str, folder: str, environment: dict[str, str]) -> None:
    gc.freeze()  # what was imported need not be looked through by every collection
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    rank = environment["RANK"]
    log = os.open(Path(folder, f"log{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        module, function = target.split(":")
        payload = torch.load(Path(folder, "payload.pt"), weights_only=True)
        result = getattr(importlib.import_module(module), function)(payload)
        torch.save(result, Path(folder, f"result{rank}.pt"))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # peers may wait in a collective: do not let clean-up wait for them
