"""``apo-doctor selftest``: does one update come out the same on one rank and on several of this machine?"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apo_megatron.diagnosis.selftest import MAX_SECONDS, Outcome, compare_layouts
from apo_megatron.telemetry.command_parser import CommandParser

PROGRAM = "apo-doctor selftest"
EXIT_DIFFERS = 3
_LINES_OF_LOG = 15


def selftest(words: Sequence[str]) -> int:
    """Print the table and the verdict; 3 where a layout differs or fails. Raises ConfigError."""
    options = command_parser().parse_args(words)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="apo_selftest_") as folder:
        outcome = compare_layouts(Path(folder), options.max_seconds)
    seconds = time.monotonic() - start
    if options.json:
        layouts = [{**asdict(comparison), "agrees": comparison.agrees} for comparison in outcome.comparisons]
        print(json.dumps({"ok": outcome.agrees, **asdict(outcome), "comparisons": layouts}, indent=2))
    else:
        console = Console(highlight=False)
        if outcome.comparisons:
            console.print(_table(outcome))
        _say_verdict(console, outcome, seconds)
    return 0 if outcome.agrees else EXIT_DIFFERS


def _table(outcome: Outcome) -> Table:
    table = Table(title=f"two APO updates in fp32, {outcome.backend}: relative difference to one rank")
    table.add_column("layout", no_wrap=True)
    for name in ("ranks", "loss", "gradient norm", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("")
    for comparison in outcome.comparisons:
        numbers = [f"{value:.1e}" for value in comparison.differences.values()]
        verdict = Text("agrees", "green") if comparison.agrees else Text("DIFFERS", "bold red")
        alone = comparison.num_ranks == 1
        row = ["-" for _ in numbers] if alone else numbers
        table.add_row(
            comparison.layout, str(comparison.num_ranks), *row, Text("runs", "green") if alone else verdict
        )
    return table


def _say_verdict(console: Console, outcome: Outcome, seconds: float) -> None:
    found, failure = outcome.comparisons, outcome.failure
    if failure is not None:
        console.print(f"FAILED: {failure.message}. The end of its log:")
        console.print(Text("\n".join(failure.log.splitlines()[-_LINES_OF_LOG:])), soft_wrap=True)
        console.print("apo-doctor check looks for the usual reasons: driver, /dev/shm, host names, versions.")
        return
    if wrong := [comparison.layout for comparison in found if not comparison.agrees]:
        bound = found[0].bound
        console.print(
            f"{', '.join(wrong)}: more than rounding ({bound:g}) apart from one rank. Do not train on this "
            "layout here: compare the versions with constraints.txt, and report it with this table.",
            soft_wrap=True,
        )
        return
    if len(found) == 1:
        console.print("one GPU: nothing to compare with, but a step runs.", end=" ")
    else:
        console.print("The same update on every layout, up to rounding.", end=" ")
    console.print(f"({seconds:.0f} s)")


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(
        prog=PROGRAM,
        description="Two updates of a tiny random model on one rank and on several: loss, gradient norm\nand "
        "parameters must agree. On GPUs with NCCL, a GPU a rank; without, on two processes with gloo.\n"
        "About 30 seconds.",
        epilog=f"example:\n  {PROGRAM}\n\nexit codes: 0 = all agree, {EXIT_DIFFERS} = not, 2 = wrong words",
    )
    parser.add_argument(
        "--max-seconds",
        metavar="S",
        type=float,
        default=MAX_SECONDS,
        help="before it counts as hanging (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="for programs instead of people")
    return parser
