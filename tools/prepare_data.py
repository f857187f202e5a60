"""Writes a cleaned JSONL file from a data set: repeated, contaminated and over-long prompts are left out.

    python -m tools.prepare_data --config prepare.yaml [source.path=... output_path=... ngram=13]

The settings are in docs/configuration.md, an example in docs/data.md. A row of the result has the columns id
and prompt, those named by source.fields, and all others of the data set.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from apo_megatron.config.data import PrepareConfig
from apo_megatron.data.cleaning import Cleaner, CleaningReport
from apo_megatron.data.prompts import PromptRow, read_prompt_rows
from apo_megatron.data.tokenizer import load_tokenizer
from apo_megatron.errors import DataError
from apo_megatron.files import written_aside
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.telemetry.progress import RunDisplay


def prepare(cfg: PrepareConfig) -> CleaningReport:
    """Write cfg.output_path, whole or not at all. Raises ConfigError and DataError."""
    tokenizer = None if cfg.tokenizer is None else load_tokenizer(cfg.tokenizer, field="tokenizer")
    output = Path(cfg.output_path)
    output.parent.mkdir(parents=True, exist_ok=True)
    with RunDisplay(1, True, "prepare") as display:
        with display.phase("evaluation sets"):
            cleaner = Cleaner(cfg, tokenizer)

        def rows() -> Iterator[PromptRow]:
            for row in read_prompt_rows(cfg.source.path, cfg.source):
                advance(1)
                yield row

        with display.phase("rows") as advance, written_aside(output) as file:
            for row in cleaner.clean(rows()):
                file.write(_json_line(row))
            if not cleaner.report.num_kept:
                raise DataError(f"{cfg.source.path}: nothing is left of it\n{report_text(cleaner.report)}")
    return cleaner.report


def _json_line(row: PromptRow) -> bytes:
    values = {"id": row.prompt_id, "prompt": row.prompt}
    for name, value in row.fields.items():
        if name in values:  # the data set's own id, where another column gives the ids
            continue
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{row.place}: column {name!r} cannot be written as JSON ({error}): drop the column, or turn "
                "it into text"
            ) from error
        values[name] = value
    return json.dumps(values).encode() + b"\n"


def report_text(report: CleaningReport) -> str:
    """What a person reads."""
    lines = [
        f"{report.num_rows:>12,} rows read",
        f"{report.num_duplicates:>12,} removed: the prompt stands in an earlier row",
        *(f"{count:>12,} removed: an overlap with {name}" for name, count in report.num_contaminated.items()),
        f"{report.num_too_long:>12,} removed: too long",
        f"{report.num_kept:>12,} rows kept",
    ]
    if report.num_contradictions:
        lines.append(
            f"{report.num_contradictions:,} of the repeated prompts have other fields than the first one, "
            "which was kept:"
        )
        lines += [f"  {place} against {kept}" for place, kept in report.contradictions]
    if report.overlaps:
        lines.append("overlaps, for instance:")
        lines += [f"  {place} with {overlap.place}: {overlap.words!r}" for place, overlap in report.overlaps]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        cfg = parse_command_line(words, PrepareConfig, "python -m tools.prepare_data")
        print(report_text(prepare(cfg)))
        print(f"written to {cfg.output_path}")

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
