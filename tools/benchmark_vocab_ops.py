"""Time and memory of the vocabulary-parallel ops beside Megatron's cross-entropy and plain torch.

    python -m tools.benchmark_vocab_ops --quick
    python -m tools.benchmark_vocab_ops --sizes 2048x151936 --dtypes fp32 bf16 --world 1 2 --output table.md
    python -m tools.benchmark_vocab_ops --memory-curve curve.png --output curve.md

Measures operations on logits (part ``logits``) and on what logits are made of (part ``head``). The last form
measures instead how the memory of the vocabulary end grows with the length of a sequence.

Starts one process per rank by itself, or measures the world it is started in under torchrun. Every
repetition runs all operations in turn, so that a busy machine disturbs them alike; the least time of the
forward counts and the least of the backward, of several ranks that of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apo_megatron.config.parallel import ParallelConfig
from apo_megatron.parallel.state import init_parallel
from tools.measurement import CLOCKS, DTYPES, MIB, add_clock_option, measure_in_turn, run_ranks
from tools.memory_curve import CURVE_LENGTHS, curve_table, draw_curve, measure_curve
from tools.vocab_operations import Case, head_operations, logit_operations

SIZES = ["512x32000", "512x151936", "2048x151936"]
PARTS = {"logits": logit_operations, "head": head_operations}


@dataclass(frozen=True)
class Measurement:
    """One line of a table. Times of the slowest rank, memory and traffic of rank 0."""

    part: str
    size: str
    dtype: str
    world: int
    k: int
    name: str
    is_yardstick: bool
    forward_ms: float
    backward_ms: float
    extra_bytes: int  # peak beyond the logits (part logits); hidden states, weight, gradients (part head)
    logit_bytes: int
    num_collectives: int  # forward and backward
    num_bytes: int  # handed to them

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def measure(
    part: str, size: str, dtype: str, case: Case, options: argparse.Namespace
) -> Iterator[Measurement]:
    """The operations of a part on one case."""
    operations = [op for op in PARTS[part](case) if any(word in op.name for word in options.only)]
    results = measure_in_turn(operations, options.repetitions, case.parallel, CLOCKS[options.clock])
    for operation, result in zip(operations, results, strict=True):
        yield Measurement(
            part=part,
            size=size,
            dtype=dtype,
            world=case.parallel.dims.tensor,
            k=case.k,
            name=operation.name,
            is_yardstick=operation.is_yardstick,
            forward_ms=1e3 * result.forward_seconds,
            backward_ms=1e3 * result.backward_seconds,
            extra_bytes=result.extra_bytes,
            logit_bytes=case.logit_bytes,
            num_collectives=result.num_collectives,
            num_bytes=result.num_bytes,
        )


def table(measurements: Iterable[Measurement]) -> str:
    """Markdown; the ratios are relative to the operation in bold above."""
    head = (
        "T x V | dtype | p | K | operation | forward ms | backward ms | ratio | forward | backward "
        "| extra MiB | of the logits | collectives | MiB moved"
    )
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    yardstick: Measurement | None = None
    for m in measurements:
        yardstick = m if m.is_yardstick or yardstick is None else yardstick
        ratios = [
            _ratio(m.total_ms, yardstick.total_ms),
            _ratio(m.forward_ms, yardstick.forward_ms),
            _ratio(m.backward_ms, yardstick.backward_ms),
        ]
        cells = [
            *(m.size, m.dtype, str(m.world), str(m.k), f"**{m.name}**" if m.is_yardstick else m.name),
            *(f"{m.forward_ms:.1f}", f"{m.backward_ms:.1f}" if m.backward_ms else "", *ratios),
            *(f"{m.extra_bytes / MIB:.1f}", f"{100 * m.extra_bytes / m.logit_bytes:.1f} %"),
            *(str(m.num_collectives), f"{m.num_bytes / MIB:.2f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(value: float, yardstick: float) -> str:
    return f"{value / yardstick:.2f}" if value and yardstick else ""


def tables(measurements: Sequence[Measurement]) -> str:
    """One for each part."""
    by_part = [[m for m in measurements if m.part == part] for part in PARTS]
    return "\n\n".join(table(of_part) for of_part in by_part if of_part)


def measure_this_world(options: argparse.Namespace) -> list[Measurement]:
    """The measurements of the world this process is a rank of."""
    parallel = init_parallel(ParallelConfig(tensor_parallel_size=int(os.environ["WORLD_SIZE"])))
    torch.set_num_threads(options.threads)
    found: list[Measurement] = []
    for size in options.sizes:
        num_rows, vocab_size = (int(number) for number in size.split("x"))
        for dtype in options.dtypes:
            for k in options.top_k:
                case = Case.make(num_rows, vocab_size, options.hidden_size, k, DTYPES[dtype], parallel)
                for part in options.parts:
                    found += measure(part, size, dtype, case, options)
                    if parallel.is_main:
                        print(f"measured {part} {size} {dtype} K={k} p={parallel.world}", file=sys.stderr)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--sizes", nargs="+", default=SIZES, metavar="TxV", help=f"default: {' '.join(SIZES)}"
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--hidden-size", type=int, default=896, metavar="H", help="of the LM head")
    parser.add_argument("--world", nargs="+", type=int, default=[1, 2], help="ranks p, default: 1 2")
    parser.add_argument("--top-k", nargs="+", type=int, default=[8], metavar="K", help="default: 8")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="operations named like that")
    parser.add_argument("--repetitions", type=int, default=5)
    add_clock_option(parser)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank, default: 1")
    parser.add_argument("--quick", action="store_true", help="one small size, two repetitions")
    parser.add_argument("--memory-curve", type=Path, metavar="PNG", help="measure that instead, and draw it")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(CURVE_LENGTHS), help="of the curve, in tokens"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)  # from run_ranks
    options = parser.parse_args(argv)
    if options.quick:
        options.sizes, options.hidden_size, options.repetitions = ["64x32000"], 64, 2
        options.lengths = [256, 512]
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silent
    arguments = sys.argv[1:] if argv is None else list(argv)
    if options.memory_curve is not None:
        points = measure_curve(options.lengths)
        draw_curve(points, options.memory_curve)
        text = curve_table(points)
    elif "RANK" in os.environ:
        measurements = measure_this_world(options)
        if os.environ["RANK"] != "0":
            return
        text = tables(measurements)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(m) for m in measurements]))
            return
    else:
        found = [
            Measurement(**fields)
            for world in options.world
            for fields in run_ranks("tools.benchmark_vocab_ops", arguments, world, options.threads)
        ]
        text = tables(found)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
