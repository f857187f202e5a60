"""Runs the same APO update on one rank and on several, as processes of this machine, and compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from apo_megatron.diagnosis.differences import relative_differences
from apo_megatron.diagnosis.tiny_model import write_tiny_model
from apo_megatron.parallel.device_facts import num_gpus

# fp32 with sums in another order; GPUs have fused kernels of their own.
BOUND_ON_CPU, BOUND_ON_GPU = 1e-5, 1e-4
MAX_SECONDS = 300.0  # it takes about 30
Layout = Mapping[str, Any]

_TENSOR = {"tensor_parallel_size": 2}
_PIPELINE = {"pipeline_parallel_size": 2}
# Ranks -> layouts; what a layout leaves of the ranks is data parallel.
LAYOUTS: dict[int, dict[str, Layout]] = {
    2: {
        "DP2": {},
        "TP2": _TENSOR,
        "TP2 + SP": {**_TENSOR, "sequence_parallel": True},
        "PP2": _PIPELINE,
        "CP2": {"context_parallel_size": 2},
    },
    4: {
        "DP4": {},
        "TP2 x DP2": _TENSOR,
        "TP2 x PP2": {**_TENSOR, "sequence_parallel": True, **_PIPELINE},
    },
    8: {"DP8": {}, "TP2 x PP2 x DP2": {**_TENSOR, "sequence_parallel": True, **_PIPELINE}},
}


@dataclass(frozen=True)
class Comparison:
    """One layout against one rank; ``differences`` are those of ``relative_differences``."""

    layout: str
    num_ranks: int
    differences: dict[str, float]
    bound: float

    @property
    def agrees(self) -> bool:
        return all(value <= self.bound for value in self.differences.values())  # not so for NaN


@dataclass(frozen=True)
class Failure:
    """The rank that ended with an error, or did not end, and what it has printed."""

    message: str
    log: str


@dataclass(frozen=True)
class Outcome:
    """What was compared, until something failed. ``backend`` is None where nothing ran."""

    backend: str | None
    comparisons: list[Comparison]
    failure: Failure | None

    @property
    def agrees(self) -> bool:
        return self.failure is None and all(comparison.agrees for comparison in self.comparisons)


def world_sizes(gpus: int) -> list[int]:
    """Those to compare with one rank: with GPUs, a GPU a rank; without, two processes on the CPU."""
    return [size for size in LAYOUTS if size <= gpus] if gpus else [2]


def compare_layouts(folder: Path, max_seconds: float = MAX_SECONDS) -> Outcome:
    """Run one rank, then each world that this machine allows. With a single GPU one rank is all there is.

    ``folder`` is empty and takes model, logs and results. No process outlives the call.
    """
    (folder / "model").mkdir()
    write_tiny_model(folder / "model")
    gpus = num_gpus()
    worlds: dict[int, dict[str, Layout]] = {1: {"one rank": {}}}
    worlds |= {size: LAYOUTS[size] for size in world_sizes(gpus)}
    # Here, as in torchrun: a port that is only chosen may be another program's when the ranks come to it.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in worlds]
    plan = [
        {"size": size, "port": store.port, "layouts": list(layouts.values())}
        for (size, layouts), store in zip(worlds.items(), stores, strict=True)
    ]
    (folder / "worlds.json").write_text(json.dumps(plan))
    failure = _run_ranks(folder, max(worlds), max_seconds)
    bound = BOUND_ON_GPU if gpus else BOUND_ON_CPU
    return _compare(folder, worlds, bound, failure)


def _compare(
    folder: Path, worlds: Mapping[int, Mapping[str, Layout]], bound: float, failure: Failure | None
) -> Outcome:
    backend, comparisons, alone = None, [], None
    for size, layouts in worlds.items():
        path = folder / f"results_{size}.pt"
        if not path.exists():
            break  # this one failed
        results = torch.load(path, weights_only=True)
        alone = alone or results[0]
        backend = alone["backend"]
        comparisons += [
            Comparison(name, size, relative_differences(result, alone), bound)
            for name, result in zip(layouts, results, strict=True)
        ]
    return Outcome(backend, comparisons, failure)


def _run_ranks(folder: Path, size: int, max_seconds: float) -> Failure | None:
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    with _ranks(folder, logs) as ranks:
        failed = _first_failure(ranks, max_seconds)
        if failed is None:
            return None
        code = ranks[failed].poll()
        why = f"did not end within {max_seconds:.0f} s" if code is None else f"ended with {code}"
        return Failure(f"rank {failed} of {size} {why}", logs[failed].read_text(errors="replace"))


@contextmanager
def _ranks(folder: Path, logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are gone after the ``with`` block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, path in enumerate(logs):
            command = [sys.executable, "-m", "apo_megatron.diagnosis.selftest_rank", str(folder), str(rank)]
            with path.open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]], max_seconds: float) -> int | None:
    """Wait for all; the rank that failed first, or that has not ended in time."""
    deadline = time.monotonic() + max_seconds
    while True:
        codes = [process.poll() for process in ranks]
        if failed := [rank for rank, code in enumerate(codes) if code]:
            return failed[0]
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None)
        time.sleep(0.05)
