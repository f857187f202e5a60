"""Writes the page about evaluations: its frame, and the data, benchmark by benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from apo_megatron.evaluation.report.contents import benchmark_contents, compare_with_first
from apo_megatron.evaluation.report.folders import Evaluation, read_evaluations, shared_benchmarks
from apo_megatron.evaluation.report.reader_warnings import (
    Warned,
    benchmark_warnings,
    general_warnings,
    merged,
)
from apo_megatron.evaluation.report.samples import choose_samples
from apo_megatron.files import written_aside
from apo_megatron.telemetry.page.document import frame, packaged, write_json

MAX_SAMPLE_BYTES = 24 * 2**20  # of all samples in the page
_STYLE = "samples.css"
_SCRIPTS = ("curves.js", "problems.js", "tables.js", "browser.js", "page.js")


def write_report(folders: Sequence[Path], output: Path) -> list[Warned]:
    """Write the page about these evaluations to ``output``, whole or not at all; returns its warnings.

    ``folders`` are those of evaluations (docs/evaluation.md, Report); the others are compared with the first.
    Memory is bounded by the number of problems and the size of the page, whatever the number of samples.
    Raises DataError where a folder cannot be read, or compared with the first.
    """
    evaluations = read_evaluations(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    head, tail = _frame(evaluations)
    with written_aside(output) as file:
        file.write(head)
        warned = _write_data(file, evaluations)
        file.write(tail)
    return warned


def _write_data(file: BinaryIO, evaluations: Sequence[Evaluation]) -> list[Warned]:
    """A script element of samples for each benchmark and checkpoint, then one with all the rest.

    Returns the warnings in it.
    """
    names = shared_benchmarks(evaluations)
    warned: list[Warned] = []
    benchmarks = []
    room, num_left = MAX_SAMPLE_BYTES, len(names) * len(evaluations)
    for place, name in enumerate(names):
        problems = [evaluation.problems(name) for evaluation in evaluations]
        comparisons = compare_with_first(evaluations, name)
        contents = benchmark_contents(evaluations, name, comparisons, problems[0])
        num_disagreeing = []
        for checkpoint, evaluation in enumerate(evaluations):
            result = evaluation.benchmarks[name]
            chosen = choose_samples(evaluation.generations(name), result, room // num_left)
            num_disagreeing.append(chosen.num_disagreeing)
            samples = [[sample.to_json() for sample in samples] for samples in chosen.by_problem]
            written = write_json(file, f"samples-{place}-{checkpoint}", samples)
            room, num_left = room - written, num_left - 1
            contents["checkpoints"][checkpoint] |= {
                "num_shown": chosen.num_shown,
                "num_characters": chosen.num_characters,
            }
        warned += benchmark_warnings(evaluations, name, comparisons, problems, num_disagreeing)
        benchmarks.append(contents)
    warned = merged([*warned, *general_warnings(evaluations)])
    write_json(
        file,
        "report",
        {
            "labels": [evaluation.label for evaluation in evaluations],
            "benchmarks": benchmarks,
            "warnings": [asdict(warning) for warning in warned],
        },
    )
    return warned


def _frame(evaluations: Sequence[Evaluation]) -> tuple[bytes, bytes]:
    """The page before and after the data."""
    title = "Evaluation: " + " / ".join(evaluation.label for evaluation in evaluations)
    return frame(title, [_packaged(_STYLE)], [_packaged(name) for name in _SCRIPTS])


def _packaged(name: str) -> str:
    return packaged(__package__, name)
