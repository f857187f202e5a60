"""Time and memory of the vocabulary-parallel ops beside Megatron's cross-entropy and plain torch.

    python tools/benchmark_vocab_ops.py --quick
    python tools/benchmark_vocab_ops.py --sizes 2048x151936 --dtypes fp32 bf16 --world 1 2 --output table.md

Starts one process per rank by itself, or measures the world it is started in under torchrun. Every
repetition runs all operations in turn, so that a busy machine disturbs them alike; the least time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from apo_megatron.config.schema import ParallelConfig
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ["512x32000", "512x151936", "2048x151936"]


@dataclass(frozen=True)
class Operation:
    """``forward`` maps logits [T, V/p] to the tensors that get a gradient of ones (none: forward only)."""

    name: str
    forward: Callable[[Tensor], Sequence[Tensor]]
    is_yardstick: bool = False  # the operations after it are compared with it


@dataclass(frozen=True)
class Measurement:
    """One line of the table."""

    size: str
    dtype: str
    world: int
    name: str
    is_yardstick: bool
    forward_ms: float
    backward_ms: float
    extra_memory: float  # peak allocation beyond the logits, over the logits shard
    num_collectives: int


def operations(
    num_rows: int, vocab_size: int, k: int, parallel: ParallelContext, shard: VocabShard
) -> list[Operation]:
    """What is compared. Plain torch sees one rank's columns only: at p > 1 it has no counterpart."""
    # These import Megatron, which on a CPU must come after init_parallel has installed the adapter.
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    support_ids = (targets.unsqueeze(1) + 1 + torch.arange(k) * (vocab_size // (k + 1))) % vocab_size
    targets, support_ids = targets.to(parallel.device), support_ids.to(parallel.device)

    def policy_terms(logits: Tensor) -> Sequence[Tensor]:
        return vocab_parallel_policy_terms(logits, targets, support_ids, shard)

    def megatron(logits: Tensor) -> Sequence[Tensor]:
        return (vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1)),)

    def megatron_fused(logits: Tensor) -> Sequence[Tensor]:
        group = parallel.tensor_group
        return (fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1), group),)

    def plain_torch(logits: Tensor) -> Sequence[Tensor]:
        log_probs = logits.float().log_softmax(1)
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(1)
        del entropy  # reported, not trained on
        return (
            log_probs.gather(1, targets.unsqueeze(1)).squeeze(1),
            log_probs.gather(1, support_ids).logsumexp(1),
        )

    def topk(logits: Tensor) -> Sequence[Tensor]:
        vocab_parallel_topk(logits, k, shard)
        return ()

    def torch_topk(logits: Tensor) -> Sequence[Tensor]:
        logits.detach().topk(k, 1)
        return ()

    def torch_topk_log_probs(logits: Tensor) -> Sequence[Tensor]:
        values = logits.detach().topk(k, 1).values
        _ = values.float() - logits.detach().float().logsumexp(1, keepdim=True)
        return ()

    chosen = [
        Operation("policy_terms", lambda logits: policy_terms(logits)[:2], is_yardstick=True),
        Operation("policy_terms, gradient of the entropy too", policy_terms),
        Operation("Megatron cross-entropy (log-prob only)", megatron),
        Operation(f"topk, K={k}, with log-probs", topk, is_yardstick=True),
        Operation("torch.topk on the shard (no merge, no log-probs)", torch_topk),
    ]
    if shutil.which("c++") is not None:  # torch.compile needs one
        chosen.insert(3, Operation("Megatron fused cross-entropy (log-prob only)", megatron_fused))
    if parallel.dims.tensor == 1:
        chosen.insert(3, Operation("plain torch, same outputs as policy_terms", plain_torch))
        chosen.append(Operation("torch.topk + logsumexp", torch_topk_log_probs))
    return chosen


def run_once(operation: Operation, logits: Tensor, device: torch.device) -> tuple[float, float]:
    """Milliseconds of forward and backward; logits is overwritten by some operations."""
    leaf = logits.detach().requires_grad_()
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    outputs = operation.forward(leaf)
    synchronize(device)
    middle = time.perf_counter()
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        synchronize(device)
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def profile_once(operation: Operation, logits: Tensor, device: torch.device) -> tuple[int, int]:
    """Peak bytes allocated beyond what was there before, and collectives. Serves as the warm-up, too."""
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    run_once(operation, logits, device)  # compiles what is compiled, starts what is started lazily
    before = 0
    if accelerator is not None:
        accelerator.reset_peak_memory_stats()
        before = accelerator.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_once(operation, logits, device)
    kineto = recorded.profiler.kineto_results
    events = sorted(kineto.events(), key=lambda event: event.start_ns())
    # The barrier of run_once is a c10d operation as well.
    collectives = sum(e.name().startswith("c10d::") and "barrier" not in e.name() for e in events)
    if accelerator is not None:
        return accelerator.max_memory_allocated() - before, collectives
    current = peak = 0
    for event in events:
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak, collectives


def measure(
    size: str, dtype: str, k: int, repetitions: int, parallel: ParallelContext
) -> Iterable[Measurement]:
    """All operations on one size and dtype; the slowest rank's times."""
    num_rows, vocab_size = (int(number) for number in size.split("x"))
    world = parallel.dims.tensor
    shard = VocabShard.of_rank(parallel.tensor_rank, world, vocab_size, vocab_size, parallel.tensor_group)
    original = torch.empty(num_rows, shard.width, dtype=DTYPES[dtype], device=parallel.device).normal_(0, 3)
    logits = original.clone()
    chosen = operations(num_rows, vocab_size, k, parallel, shard)
    costs = {}
    for operation in chosen:
        logits.copy_(original)
        costs[operation.name] = profile_once(operation, logits, parallel.device)
    times = torch.zeros(repetitions, len(chosen), 2, dtype=torch.float64)
    for repetition in range(repetitions):
        for i, operation in enumerate(chosen):
            logits.copy_(original)
            times[repetition, i] = torch.tensor(run_once(operation, logits, parallel.device))
    times = times.to(parallel.device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    for i, operation in enumerate(chosen):
        best = int(times[:, i].sum(1).argmin())
        peak, collectives = costs[operation.name]
        yield Measurement(
            size=size,
            dtype=dtype,
            world=world,
            name=operation.name,
            is_yardstick=operation.is_yardstick,
            forward_ms=float(times[best, i, 0]),
            backward_ms=float(times[best, i, 1]),
            extra_memory=peak / (original.numel() * original.element_size()),
            num_collectives=collectives,
        )


def table(measurements: Sequence[Measurement]) -> str:
    """Markdown; the ratio is that of forward + backward to the line in bold above it."""
    lines = [
        "| T x V | dtype | p | operation | forward ms | backward ms | ratio | extra memory | collectives |",
        "|" + "---|" * 9,
    ]
    yardstick = measurements[0]
    for m in measurements:
        yardstick = m if m.is_yardstick else yardstick
        ratio = (m.forward_ms + m.backward_ms) / (yardstick.forward_ms + yardstick.backward_ms)
        name = f"**{m.name}**" if m.is_yardstick else m.name
        lines.append(
            f"| {m.size} | {m.dtype} | {m.world} | {name} | {m.forward_ms:.1f} | {m.backward_ms:.1f} "
            f"| {ratio:.2f} | {100 * m.extra_memory:.1f} % | {m.num_collectives} |"
        )
    return "\n".join(lines)


def measure_this_world(options: argparse.Namespace) -> list[Measurement]:
    """The measurements of the world this process is a rank of."""
    world = int(os.environ["WORLD_SIZE"])
    parallel = init_parallel(ParallelConfig(tensor_parallel_size=world))
    torch.set_num_threads(options.threads)
    found: list[Measurement] = []
    for size in options.sizes:
        for dtype in options.dtypes:
            found += measure(size, dtype, options.top_k, options.repetitions, parallel)
            if parallel.is_main:
                print(f"measured {size} {dtype} p={world}", file=sys.stderr, flush=True)
    return found


def start_world(world: int, options: argparse.Namespace) -> list[Measurement]:
    """Run this file again on ``world`` ranks. Raises CalledProcessError where a rank fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "measurements.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [__file__, "--json", str(result), "--top-k", str(options.top_k)]
        command += ["--repetitions", str(options.repetitions), "--threads", str(options.threads)]
        command += ["--sizes", *options.sizes, "--dtypes", *options.dtypes]
        environment = {"OMP_NUM_THREADS": str(options.threads), "KINETO_LOG_LEVEL": "9"}  # 9: silent
        subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=sys.stderr)
        return [Measurement(**fields) for fields in json.loads(result.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="TxV", help=f"default: {' '.join(SIZES)}"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--world", nargs="+", type=int, default=[1, 2], help="ranks p, default: 1 2")
    parser.add_argument("--top-k", type=int, default=8, metavar="K", help="size of the support, default: 8")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank, default: 1")
    parser.add_argument("--quick", action="store_true", help="one small size, two repetitions")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # from start_world to its ranks
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repetitions = ["64x32000"], 2
    if "RANK" in os.environ:
        measurements = measure_this_world(options)
        if os.environ["RANK"] != "0":
            return
    else:
        measurements = [m for world in options.world for m in start_world(world, options)]
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(m) for m in measurements]))
        return
    print(table(measurements))
    if options.output is not None:
        options.output.write_text(table(measurements) + "\n")


if __name__ == "__main__":
    main()
