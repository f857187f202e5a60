"""What the benchmarks have in common: time, memory and traffic of a call, and worlds of several ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from apo_megatron.parallel.state import ParallelContext

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")

# As the profiler spells them.
_ITEM_BYTES = {
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "int": 4,
    "float": 4,
    "long": 8,
    "long int": 8,
    "double": 8,
}


Tensors = Sequence[Tensor]


def backward_of_ones(outputs: Tensors) -> None:
    torch.autograd.backward(list(outputs), [torch.ones_like(output) for output in outputs])


@dataclass(frozen=True)
class Operation:
    """One line of a table. ``prepare`` is not measured; ``forward`` returns the tensors that ``backward``
    starts from, () where there is none."""

    name: str
    forward: Callable[[], Tensors]
    backward: Callable[[Tensors], None] = backward_of_ones
    prepare: Callable[[], object] = lambda: None
    leaves: Tensors = ()  # the memory of their gradients is not extra
    is_yardstick: bool = False  # the operations after it are compared with it
    is_compiled: bool = False  # in its first run


@dataclass
class Result:
    """Of all repetitions of one operation: the least seconds of the slowest rank; else of this rank."""

    forward_seconds: float
    backward_seconds: float
    extra_bytes: int  # the most that was allocated beyond what was there before, and the leaves' gradients
    num_collectives: int  # and sends, forward and backward
    num_bytes: int  # that this rank handed over to them

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Cost:
    """Of one call on one rank."""

    seconds: float
    peak_bytes: int  # the most that was allocated at a time, beyond what was there before
    left_bytes: int  # what is allocated after it, beyond what was there before; negative where it freed some
    num_collectives: int  # and sends
    num_bytes: int  # that this rank handed over to them


def measure_in_turn(
    operations: Sequence[Operation],
    repetitions: int,
    parallel: ParallelContext,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Every repetition runs all operations, so that a busy machine disturbs them alike.

    The first is profiled for memory and traffic, which can only slow it down; its time counts as well.
    """
    results = [run_first(operation, parallel, clock) for operation in operations]
    for _ in range(repetitions - 1):
        for operation, result in zip(operations, results, strict=True):
            forward, backward = run_once(operation, parallel, clock)
            result.forward_seconds = min(result.forward_seconds, forward)
            result.backward_seconds = min(result.backward_seconds, backward)
    return results


def run_once(
    operation: Operation, parallel: ParallelContext, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of forward and backward."""
    operation.prepare()
    outputs, forward = timed(operation.forward, parallel, clock)
    if not outputs:
        return _slowest(forward, parallel), 0.0
    _, backward = timed(lambda: operation.backward(outputs), parallel, clock)
    return _slowest(forward, parallel), _slowest(backward, parallel)


def run_first(
    operation: Operation, parallel: ParallelContext, clock: Callable[[], float] = time.perf_counter
) -> Result:
    """Seconds, memory and traffic."""
    if operation.is_compiled:
        run_once(operation, parallel, clock)
    operation.prepare()
    outputs, cost = with_cost(operation.forward, parallel, clock)
    extra, left = cost.peak_bytes, cost.left_bytes
    result = Result(_slowest(cost.seconds, parallel), 0.0, extra, cost.num_collectives, cost.num_bytes)
    if outputs:
        _, cost = with_cost(lambda: operation.backward(outputs), parallel, clock)
        gradients = sum(leaf.grad.nbytes for leaf in operation.leaves if leaf.grad is not None)
        result.backward_seconds = _slowest(cost.seconds, parallel)
        result.extra_bytes = max(extra, left + cost.peak_bytes - gradients)
        result.num_collectives += cost.num_collectives
        result.num_bytes += cost.num_bytes
    return result


def timed(
    function: Callable[[], T], parallel: ParallelContext, clock: Callable[[], float]
) -> tuple[T, float]:
    """The result of a call and its seconds on this rank, which starts together with the others."""
    _synchronize(parallel.device)
    dist.barrier()
    start = clock()
    result = function()
    _synchronize(parallel.device)
    return result, clock() - start


def with_cost(
    function: Callable[[], T], parallel: ParallelContext, clock: Callable[[], float] = time.perf_counter
) -> tuple[T, Cost]:
    """The result of a call and what it costs on this rank.

    Memory is counted on a CPU by the profiler's events, one for each allocation by torch, and on a GPU by
    torch's caching allocator.
    """
    accelerator = None if parallel.device.type == "cpu" else torch.get_device_module(parallel.device)
    before = 0
    if accelerator is not None:
        accelerator.reset_peak_memory_stats()
        before = accelerator.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as recorded:
        result, seconds = timed(function, parallel, clock)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    traffic = [_num_bytes(event) for event in events if _is_traffic(event.name(), f"{parallel.backend}:")]
    if accelerator is None:
        peak, left = _allocated(events)
    else:
        peak = accelerator.max_memory_allocated() - before
        left = accelerator.memory_allocated() - before
    return result, Cost(seconds, peak, left, len(traffic), sum(traffic))


def _slowest(seconds: float, parallel: ParallelContext) -> float:
    """The largest of all ranks."""
    tensor = torch.tensor(seconds, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: processor time of a rank instead, for a CPU that is busy with other work, too;\n"
        "without what a rank waits for others",
    )


def run_ranks(module: str, arguments: Sequence[str], num_ranks: int, threads: int) -> Any:
    """Run ``python -m module arguments --json FILE`` on several ranks; what rank 0 wrote into the file.

    Raises CalledProcessError where a rank fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={num_ranks}", "--module", module, *arguments, "--json", str(result)]
        environment = {"OMP_NUM_THREADS": str(threads), "KINETO_LOG_LEVEL": "9"}  # 9: silent
        subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=sys.stderr)
        return json.loads(result.read_text())


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _allocated(events: Sequence[Any]) -> tuple[int, int]:
    """The most bytes at a time, and those at the end."""
    current = peak = 0
    for event in events:
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak, current


def _is_traffic(name: str, prefix: str) -> bool:
    """Whether a profiled event is a collective or a send of the backend; barriers are those of ``timed``."""
    return name.startswith(prefix) and name != f"{prefix}barrier" and "recv" not in name


def _num_bytes(event: Any) -> int:
    """Of the tensors that an event was called with."""
    total = 0
    for shape, dtype in zip(event.shapes(), event.dtypes(), strict=True):
        total += int(torch.Size(shape).numel()) * _ITEM_BYTES[dtype]
    return total
