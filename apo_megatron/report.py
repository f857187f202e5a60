"""The report of training runs: one page from what they leave in their directories, while they run or after.

    apo-report runs/demo/apo runs/demo/grpo --out report.html

docs/run-report.md says what the page shows and when it warns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser
from apo_megatron.telemetry.run_report import RUN_PAGE, write_run_report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        parser = CommandParser(
            prog="apo-report",
            description="Write one HTML page about training runs: curves, Pass@K, time, warnings in words.",
        )
        parser.add_argument(
            "runs",
            nargs="+",
            metavar="RUN",
            type=Path,
            help="run directories (train.run_dir), live or finished",
        )
        parser.add_argument("--out", type=Path, default=Path(RUN_PAGE), help=f"default: {RUN_PAGE}")
        options = parser.parse_args(words)
        for label, finding in write_run_report(options.runs, options.out):
            print(_plain(f"{finding.severity}: {label}: {finding.text}"))
        print(f"written to {options.out}")

    return run_command(run, argv)


def _plain(text: str) -> str:
    """With characters that a terminal would obey written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    sys.exit(main())
