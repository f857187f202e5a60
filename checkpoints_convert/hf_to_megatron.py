"""Hugging Face checkpoint -> Megatron checkpoint.

    python -m checkpoints_convert.hf_to_megatron --hf-path Qwen/Qwen2.5-7B --megatron-path qwen-megatron

The result is in Megatron's distributed format, which loads at any tensor, pipeline and expert parallel size.
For speed start several ranks: torchrun --nproc-per-node 4 -m checkpoints_convert.hf_to_megatron ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apo_megatron.parallel.world import join_cpu_world
from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from checkpoints_convert.progress import ByteProgress


def convert(argv: Sequence[str]) -> None:
    """Read the command line and convert. Raises the errors of ``errors.py`` for what a user can mend."""
    options = command_parser().parse_args(argv)
    world = join_cpu_world()
    with ByteProgress("hf -> megatron", world) as progress:
        num_bytes = hf_to_megatron(options.hf_path, options.megatron_path, world, options.overwrite, progress)
        progress.done(f"wrote {options.megatron_path}", num_bytes)


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(prog="python -m checkpoints_convert.hf_to_megatron", description=__doc__)
    parser.add_argument(
        "--hf-path", required=True, metavar="IN", help="directory with config.json and safetensors, or hub id"
    )
    parser.add_argument(
        "--megatron-path", required=True, metavar="OUT", help="directory to write; must not exist"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT, once the new checkpoint is complete"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""
    return run_command(convert, argv)


if __name__ == "__main__":
    sys.exit(main())
