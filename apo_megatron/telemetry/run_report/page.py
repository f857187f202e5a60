"""Writes the page about runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from apo_megatron.files import written_aside
from apo_megatron.telemetry.page.document import frame, packaged, write_json
from apo_megatron.telemetry.run_report.contents import page_contents
from apo_megatron.telemetry.run_report.findings import Finding, find
from apo_megatron.telemetry.run_report.folders import read_runs
from apo_megatron.telemetry.run_report.learning_checks import LEARNING_CHECKS
from apo_megatron.telemetry.run_report.machine_checks import MACHINE_CHECKS

RUN_PAGE = "report.html"
CHECKS = (*MACHINE_CHECKS, *LEARNING_CHECKS)
_STYLE = "run.css"
_SCRIPTS = ("line_charts.js", "phases.js", "tables.js", "run_page.js")


def write_run_report(folders: Sequence[Path], output: Path) -> list[tuple[str, Finding]]:
    """Write the page about these run directories to ``output``, whole or not at all.

    Returns (label of the run, finding) of each. Raises DataError where a folder holds no run.
    """
    runs = read_runs(folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    found = [(place, finding) for place, run in enumerate(runs) for finding in find(run, CHECKS)]
    contents = page_contents(runs, found, written, output.parent.absolute())
    title = "Run: " + " / ".join(run.label for run in runs)
    head, tail = frame(title, [_packaged(_STYLE)], [_packaged(name) for name in _SCRIPTS])
    with written_aside(output) as file:
        file.write(head)
        write_json(file, "report", contents)
        file.write(tail)
    return [(runs[place].label, finding) for place, finding in found]


def _packaged(name: str) -> str:
    return packaged(__package__, name)
