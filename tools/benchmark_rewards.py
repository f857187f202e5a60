"""Verified answers per second: workers, cold and warm, beside plain math-verify in one process, in one run.

    python tools/benchmark_rewards.py [--repeat 1]

Every pair of tests/data/math_answers.jsonl is verified ``--repeat`` times by each contender, without a cache
of verdicts, on the same final answers. Cold has the start of the workers in it (and, for plain math-verify,
its import); warm is the best of three rounds. Plain math-verify runs in this process with its own time-outs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from apo_megatron.rewards.answers import final_answer
from apo_megatron.rewards.equivalence import is_equivalent
from apo_megatron.rewards.workers import WorkerPool

DATA = Path(__file__).resolve().parent.parent / "tests" / "data" / "math_answers.jsonl"
NUM_WARM_ROUNDS = 3

Pairs = Sequence[tuple[str, str]]  # gold, final answer


def read_pairs(path: Path, repeat: int) -> list[tuple[str, str]]:
    """(gold, final answer) of every row, ``repeat`` times."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["gold"], final_answer(row["text"])) for row in rows] * repeat


def measure(verify: Callable[[Pairs], object], pairs: Pairs) -> tuple[float, float]:
    """Answers per second in the first round, and in the best of those that follow."""
    seconds = []
    for _ in range(1 + NUM_WARM_ROUNDS):
        begun = time.perf_counter()
        verify(pairs)
        seconds.append(time.perf_counter() - begun)
    return len(pairs) / seconds[0], len(pairs) / min(seconds[1:])


def plain_math_verify(pairs: Pairs) -> None:
    """math-verify as its own documentation uses it."""
    from math_verify import parse, verify

    for gold, answer in pairs:
        verify(parse(f"${gold}$"), parse(answer))


def same_work(pairs: Pairs) -> None:
    """What a worker does for the same pairs, without a worker."""
    for gold, answer in pairs:
        is_equivalent(gold, answer)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description="Verified answers per second.")
    parser.add_argument("--repeat", type=int, default=1, help="how often every pair is verified")
    parser.add_argument("--timeout", type=float, default=5.0, help="deadline of a task in seconds")
    options = parser.parse_args(argv)
    pairs = read_pairs(DATA, options.repeat)
    print(f"{len(pairs)} answers a round; answers per second\n")
    print(f"{'':34}{'cold':>8}{'warm':>8}")

    def report(name: str, verify: Callable[[Pairs], object]) -> float:
        cold, warm = measure(verify, pairs)
        print(f"{name:34}{cold:8.0f}{warm:8.0f}", flush=True)
        return warm

    report("plain math-verify, this process", plain_math_verify)
    alone = report("the workers' code, this process", same_work)
    for num_workers in (1, 2):
        pool = WorkerPool(num_workers, options.timeout, preload=["math_verify"])
        warm = report(f"{num_workers} worker(s)", partial(pool.map, is_equivalent))
        print(f"{'':4}{100 * warm / (num_workers * alone):.0f} % of {num_workers} x this process")
        pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
