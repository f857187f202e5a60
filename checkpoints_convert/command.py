"""Converts checkpoints between Hugging Face and Megatron, and proves the result.

    apo-convert hf-to-megatron --hf-path Qwen/Qwen2.5-7B --megatron-path checkpoints/qwen2.5-7b
    apo-convert verify --hf-path Qwen/Qwen2.5-7B --megatron-path checkpoints/qwen2.5-7b --logits
    apo-convert megatron-to-hf --megatron-path runs/x/checkpoints/step_000100 --hf-path out

Each has a --help of its own, and is a module to start several ranks of:
torchrun --nproc-per-node 4 -m checkpoints_convert.hf_to_megatron ...
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser

# Imported when asked for: they load torch and Megatron.
COMMANDS: Mapping[str, str] = {
    "hf-to-megatron": "checkpoints_convert.hf_to_megatron",
    "megatron-to-hf": "checkpoints_convert.megatron_to_hf",
    "verify": "checkpoints_convert.verify",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code is that of the command."""
    words = sys.argv[1:] if argv is None else argv
    command = None

    def read(words: Sequence[str]) -> None:
        nonlocal command
        parser = CommandParser(prog="apo-convert", description=__doc__)
        parser.add_argument("command", choices=list(COMMANDS))
        command = parser.parse_args(words[:1]).command

    code = run_command(read, words)
    if command is None:
        return code
    result: int = import_module(COMMANDS[command]).main(words[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
