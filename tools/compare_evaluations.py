"""Compares evaluations of the same problems: a table in the terminal, and the HTML page about them.

    python -m tools.compare_evaluations FOLDER FOLDER ... --out report.html

The folders are those that evaluations wrote. The first is the reference: every other one is compared with it,
problem by problem. docs/evaluation.md says what the numbers mean, and what the page shows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apo_megatron.evaluation.comparison import Comparison
from apo_megatron.evaluation.report.contents import compare_with_first
from apo_megatron.evaluation.report.folders import Evaluation, read_evaluations, shared_benchmarks
from apo_megatron.evaluation.report.page import write_report
from apo_megatron.evaluation.report.reader_warnings import SIGNIFICANT, Warned
from apo_megatron.telemetry.command import run_command


def print_comparison(evaluations: Sequence[Evaluation], console: Console) -> None:
    """A table for each benchmark and checkpoint. Labels are shown without control characters."""
    for name in shared_benchmarks(evaluations):
        comparisons = compare_with_first(evaluations, name)
        for evaluation, comparison in zip(evaluations[1:], comparisons, strict=True):
            title = f"{name}: {evaluation.label} against {evaluations[0].label}"
            console.print(_table(title, comparison))


def print_warnings(warned: Sequence[Warned], console: Console) -> None:
    """A line for each, without control characters."""
    for warning in warned:
        where = f"{warning.benchmark}: " if warning.benchmark else ""
        console.print(_plain(f"note: {where}{warning.text}"))


def _table(title: str, comparison: Comparison) -> Table:
    table = Table(
        title=_plain(title),
        caption=f"{comparison.num_problems} problems x {comparison.num_samples} samples; per cent and "
        f"points; bold: p (Holm) < {SIGNIFICANT}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("K", "Pass@K", "reference", "difference", "95 % interval", "p", "p (Holm)"):
        table.add_column(column, justify="right", no_wrap=True)
    for k, found in comparison.differences.items():
        table.add_row(
            str(k),
            f"{100 * found.a:.1f}",
            f"{100 * found.b:.1f}",
            f"{100 * found.difference:+.1f}",
            f"{100 * found.ci95[0]:+.1f} to {100 * found.ci95[1]:+.1f}",
            _chance(found.p_value),
            _chance(found.p_holm),
            style="bold" if found.p_holm < SIGNIFICANT else None,
        )
    return table


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _plain(text: str) -> Text:
    """Without markup, and with characters that a terminal would obey written out."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(
            prog="python -m tools.compare_evaluations",
            description="Compare evaluations of the same problems with the first one.",
            allow_abbrev=False,
        )
        parser.add_argument(
            "folders",
            nargs="+",
            metavar="FOLDER",
            type=Path,
            help="of evaluations; the first is the reference",
        )
        parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: report.html")
        options = parser.parse_args(words)
        evaluations = read_evaluations(options.folders)
        console = Console()
        if len(evaluations) > 1:
            print_comparison(evaluations, console)
        print_warnings(write_report(options.folders, options.out), console)
        print(f"written to {options.out}")

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
