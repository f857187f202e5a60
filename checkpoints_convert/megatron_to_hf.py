"""Megatron checkpoint -> Hugging Face checkpoint.

    python -m checkpoints_convert.megatron_to_hf --megatron-path runs/x/checkpoints/step_000100 --hf-path out

Takes what hf_to_megatron wrote, and the checkpoints of training runs (without their optimizer state). The
result has config, tokenizer and generation config in it and loads in transformers and SGLang as it is.
For speed start several ranks: torchrun --nproc-per-node 4 -m checkpoints_convert.megatron_to_hf ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from apo_megatron.errors import ConfigError
from apo_megatron.parallel.world import join_cpu_world
from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from checkpoints_convert.progress import ByteProgress

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def convert(argv: Sequence[str]) -> None:
    """Read the command line and convert. Raises the errors of ``errors.py`` for what a user can mend."""
    options = command_parser().parse_args(argv)
    if not options.max_shard_size_gb > 0:
        raise ConfigError(f"--max-shard-size-gb={options.max_shard_size_gb}: a positive number expected")
    world = join_cpu_world()
    with ByteProgress("megatron -> hf", world) as progress:
        num_bytes = megatron_to_hf(
            options.megatron_path,
            options.hf_path,
            world,
            dtype=DTYPES.get(options.dtype),
            max_shard_bytes=round(options.max_shard_size_gb * 1e9),
            config_from=options.config_from,
            overwrite=options.overwrite,
            progress=progress,
        )
        progress.done(f"wrote {options.hf_path}", num_bytes)


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(prog="python -m checkpoints_convert.megatron_to_hf", description=__doc__)
    parser.add_argument("--megatron-path", required=True, metavar="IN", help="directory with metadata.json")
    parser.add_argument("--hf-path", required=True, metavar="OUT", help="directory to write; must not exist")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the result (default: as stored)")
    parser.add_argument(
        "--max-shard-size-gb", type=float, default=4.0, metavar="GB", help="of a file (default: %(default)s)"
    )
    parser.add_argument(
        "--config-from",
        metavar="HF_DIR",
        help="model whose config.json and tokenizer to use, where IN has no folder hf",
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
