"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

Status = Literal["ok", "warning", "problem"]
_STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_SUBJECT_WIDTH = 22


@dataclass(frozen=True)
class Finding:
    """``ok``: nothing to do. ``warning``: it runs, slower or not everywhere. ``problem``: it will not run."""

    section: str
    subject: str
    status: Status
    message: str
    advice: str = ""


@dataclass(frozen=True)
class Section:
    """What findings are printed under; makes them."""

    title: str

    def ok(self, subject: str, message: str) -> Finding:
        return Finding(self.title, subject, "ok", message)

    def warning(self, subject: str, message: str, advice: str) -> Finding:
        return Finding(self.title, subject, "warning", message, advice)

    def problem(self, subject: str, message: str, advice: str) -> Finding:
        return Finding(self.title, subject, "problem", message, advice)


def count(findings: Sequence[Finding], status: Status) -> int:
    """How many findings have this status."""
    return sum(finding.status == status for finding in findings)


def as_data(findings: Sequence[Finding]) -> dict[str, Any]:
    """For programs: ``ok`` is false where there is a problem."""
    return {
        "ok": count(findings, "problem") == 0,
        "num_warnings": count(findings, "warning"),
        "num_problems": count(findings, "problem"),
        "findings": [asdict(finding) for finding in findings],
    }


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """One line a finding, by section; the advice below it; a summary at the end."""
    for section in dict.fromkeys(finding.section for finding in findings):
        console.print(Text(section, style="bold"))
        for finding in findings:
            if finding.section != section:
                continue
            _print_line(console, finding.status, f"{finding.subject:<{_SUBJECT_WIDTH}} {finding.message}")
            if finding.advice:
                indent = " " * (10 + _SUBJECT_WIDTH)
                console.print(Text(f"{indent} -> {finding.advice}"), soft_wrap=True)
    problems, warnings = count(findings, "problem"), count(findings, "warning")
    if not problems and not warnings:
        console.print(f"\n{len(findings)} checks, nothing to do")
    else:
        console.print(
            f"\n{len(findings)} checks: {_number(problems, 'problem')}, {_number(warnings, 'warning')}"
        )


def _print_line(console: Console, status: Status, text: str) -> None:
    line = Text("  ")
    line.append(f"{status:<8}", style=_STYLE[status])
    line.append(text)
    console.print(line, soft_wrap=True)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
