"""``apo-ray``: ``python -m apo_megatron.launch.ray``, or what to install for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from apo_megatron.errors import ConfigError
from apo_megatron.launch.command import read_command_line
from apo_megatron.telemetry.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if find_spec("ray") is None:
        return run_command(_without_ray, words)
    result: int = import_module("apo_megatron.launch.ray").main(words)
    return result


def _without_ray(words: Sequence[str]) -> None:
    read_command_line(words)  # --help needs no Ray
    raise ConfigError(
        'Ray is not installed: pip install "apo_megatron[ray]", or start the ranks with torchrun'
    )
