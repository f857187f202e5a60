"""Looks at the machine, and at a run before it is started.

    apo-doctor                                     packages, GPUs, limits, ports, disks, with advice
    apo-doctor check --config run.yaml             and the files, data and memory of this run
    apo-doctor selftest                            the same update on one rank and on several
    apo-doctor plan --config run.yaml              memory and arithmetic of this run (docs/planning.md)
    apo-doctor completion bash                     a script that completes options and fields

Without a command it is check. Each has a --help of its own. docs/doctor.md says what is looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser

# Imported when asked for: check must start where torch cannot be loaded.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "check": ("apo_megatron.diagnosis.check_command", "check"),
    "selftest": ("apo_megatron.diagnosis.selftest_command", "selftest"),
    "plan": ("apo_megatron.diagnosis.plan_command", "plan"),
    "completion": ("apo_megatron.diagnosis.completion_command", "completion"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); 3 where something does not fit or would not run."""
    code = 0

    def run(words: Sequence[str]) -> None:
        nonlocal code
        name, rest = _split(words)
        module, function = COMMANDS[name]
        code = getattr(import_module(module), function)(rest)

    return run_command(run, argv) or code


def _split(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    if words and words[0] in ("-h", "--help", "--version") or words and not words[0].startswith("-"):
        command: str = command_parser().parse_args(words[:1]).command
        return command, words[1:]
    return "check", words


def command_parser() -> CommandParser:
    """Of the command itself."""
    parser = CommandParser(prog="apo-doctor", description=__doc__)
    parser.add_argument("command", nargs="?", default="check", choices=list(COMMANDS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
