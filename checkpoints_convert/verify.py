"""Proof that a Megatron checkpoint holds a Hugging Face checkpoint, bit for bit.

    python -m checkpoints_convert.verify --hf-path Qwen/Qwen2.5-7B --megatron-path qwen-megatron --logits

Reads every tensor of both and compares digests, also with the manifest of the conversion. --logits then runs
the same tokens through transformers and through the Megatron model, at the layout that is asked for (torchrun
starts its processes). Ends with exit code 2 and the names of the tensors where anything differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.errors import CheckpointError, ConfigError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.state import init_parallel
from apo_megatron.parallel.world import World, join_cpu_world
from apo_megatron.telemetry.command import run_command
from apo_megatron.telemetry.command_parser import CommandParser
from apo_megatron.weights.conversion.verify import Verification, require_proof, verify_conversion
from checkpoints_convert.logits import LogitsComparison, compare_logits
from checkpoints_convert.progress import ByteProgress

_LAYOUT = ("tensor", "pipeline", "expert")


def verify(argv: Sequence[str]) -> None:
    """Read the command line and compare. Raises the errors of ``errors.py``, also for what differs."""
    options = command_parser().parse_args(argv)
    sizes = {f"{axis}_parallel_size": getattr(options, f"{axis}_parallel_size") for axis in _LAYOUT}
    if not options.logits:
        if given := [name for name, size in sizes.items() if size != 1]:
            raise ConfigError(f"{', '.join(given)}: the layout of --logits, which is not given")
        world = join_cpu_world()
        _verify_weights(options, world)
        return
    architecture = read_architecture(options.hf_path)
    has_experts = architecture.experts is not None
    parallel = init_parallel(
        # Experts under tensor parallelism need it.
        ParallelConfig(**sizes, sequence_parallel=has_experts and sizes["tensor_parallel_size"] > 1)
    )
    _verify_weights(options, parallel)
    cfg = ModelConfig(hf_path=options.hf_path, dtype=options.dtype)
    comparison = compare_logits(options.hf_path, options.megatron_path, parallel, cfg)
    if parallel.is_main:
        Console().print(_logits_table(comparison, options.dtype))
    if not comparison.agrees:
        raise CheckpointError(
            f"logits of {options.hf_path} in transformers and of {options.megatron_path} in Megatron differ "
            f"by {comparison.difference:.3g}, more than rounding ({comparison.bound:.3g})"
        )


def _verify_weights(options: argparse.Namespace, world: World) -> None:
    with ByteProgress("verify", world) as progress:
        found = verify_conversion(options.hf_path, options.megatron_path, world, progress)
        progress.done("compared", found.num_bytes)
    if world.is_main:
        Console().print(_weights_table(found))
    require_proof(found, options.hf_path, options.megatron_path)


def _weights_table(found: Verification) -> Table:
    table = Table(title="weights", show_header=False)
    table.add_row("tensors compared", str(found.num_tensors))
    changed = str(len(found.changed_sources)) if found.has_manifest else "no manifest: compared directly"
    table.add_row("source tensors that changed since the conversion", changed)
    table.add_row("tensors that differ", str(len(found.differing)))
    table.add_row("bit for bit equal", "yes" if found.is_proven else "NO")
    return table


def _logits_table(found: LogitsComparison, dtype: str) -> Table:
    table = Table(title=f"logits, {dtype}", show_header=False)
    table.add_row("largest logit", f"{found.largest:.3g}")
    table.add_row("largest difference", f"{found.difference:.3g}")
    table.add_row("bound", f"{found.bound:.3g}")
    table.add_row("agree", "yes" if found.agrees else "NO")
    return table


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(prog="python -m checkpoints_convert.verify", description=__doc__)
    parser.add_argument("--hf-path", required=True, metavar="A", help="directory, or hub id")
    parser.add_argument("--megatron-path", required=True, metavar="B", help="directory with metadata.json")
    parser.add_argument("--logits", action="store_true", help="compare what both models compute, too")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of both models for --logits (default: %(default)s, the sharper test)",
    )
    for axis in _LAYOUT:
        parser.add_argument(
            f"--{axis}-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="layout of the Megatron model for --logits (default: %(default)s)",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""
    return run_command(verify, argv)


if __name__ == "__main__":
    sys.exit(main())
