"""Runs a function on several gloo processes, once, for many checks (each process pays seconds of imports)."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_distributed(
    world_size: int, target: str, payload: dict[str, Any], timeout: float = 900.0, use_gpu: bool = False
) -> list[Any]:
    """Call ``module:function`` with ``payload`` in every rank of a new world; the results by rank.

    Payload and results hold plain containers, numbers, strings and CPU tensors. A rank that raises fails the
    test with its traceback. Without ``use_gpu`` the ranks see no GPU, so they run on gloo everywhere.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(payload, Path(folder, "payload.pt"))
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        if not use_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.distributed", target, folder],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=open(Path(folder, f"log{rank}"), "w"),  # noqa: SIM115 (closed with the process)
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]
        _wait(processes, folder, target, timeout)
        return [torch.load(Path(folder, f"result{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: str, target: str, timeout: float) -> None:
    try:
        for process in processes:
            process.wait(timeout)
            if process.returncode != 0:
                break
    except subprocess.TimeoutExpired:
        pass
    failed = [rank for rank, process in enumerate(processes) if process.poll() != 0]
    if not failed:
        return
    for process in processes:
        process.kill()
        process.wait()
    logs = "\n".join(f"--- rank {rank}\n{Path(folder, f'log{rank}').read_text()[-4000:]}" for rank in failed)
    raise AssertionError(f"{target} failed on ranks {failed}\n{logs}")


def _main(target: str, folder: str) -> None:
    module, function = target.split(":")
    payload = torch.load(Path(folder, "payload.pt"), weights_only=True)
    result = getattr(importlib.import_module(module), function)(payload)
    torch.save(result, Path(folder, f"result{os.environ['RANK']}.pt"))


if __name__ == "__main__":
    try:
        _main(sys.argv[1], sys.argv[2])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # peers may wait in a collective: do not let clean-up wait for them
