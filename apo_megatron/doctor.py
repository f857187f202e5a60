"""Looks at a run before it is started. Nothing is allocated, nothing communicates.

    python -m apo_megatron.doctor plan --config examples/countdown/apo.yaml --world-size 2

``plan`` predicts memory and arithmetic from the configuration and the model's config.json; the weights need
not be there. What is predicted, and how it was checked: docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from rich.console import Console

from apo_megatron.config import ParallelConfig, RLConfig
from apo_megatron.errors import ConfigError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.device_memory import gpu_memory_bytes
from apo_megatron.planning.plan import Setting, make_plan
from apo_megatron.planning.proposals import propose
from apo_megatron.planning.report import plan_as_data, print_plan, print_proposals
from apo_megatron.telemetry.command import parse_command_line, run_command

PROGRAM = "python -m apo_megatron.doctor"
EXIT_DOES_NOT_FIT = 3
DEFAULT_DEVICE_GIB = 80.0  # where there is no GPU to look at
TABLE_WIDTH = 110  # columns of three stages; where nobody looks rich assumes less
_GIB = 2**30


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}   (or --help)")


def plan(words: Sequence[str]) -> int:
    """Print the plan and layouts that fit; the exit code says whether the plan does. Raises ConfigError."""
    parser = _plan_parser()
    options, rest = parser.parse_known_args(words)
    if options.help:
        print(parser.format_help())
        rest.append("--help")  # of the configuration, which ends the program
    cfg = parse_command_line(rest, RLConfig, f"{PROGRAM} plan")
    gpu_bytes = gpu_memory_bytes() or DEFAULT_DEVICE_GIB * _GIB
    setting = Setting(
        architecture=read_architecture(cfg.model.hf_path),
        world=options.world_size or _default_world(cfg.parallel),
        device_bytes=gpu_bytes if options.device_memory_gib is None else options.device_memory_gib * _GIB,
        sequence_length=options.sequence_length,
    )
    planned = make_plan(cfg, setting)
    proposals = propose(cfg, setting)
    if options.json:
        print(json.dumps(plan_as_data(planned, proposals), indent=2))
    else:
        console = Console(highlight=False)
        console.width = max(console.width, TABLE_WIDTH)
        print_plan(console, planned)
        print_proposals(console, planned, proposals)
    return 0 if planned.fits else EXIT_DOES_NOT_FIT


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {"plan": plan}


def _default_world(cfg: ParallelConfig) -> int:
    """That of torchrun, or the fewest ranks on which the mesh exists."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    pipeline = cfg.pipeline_parallel_size
    dense = cfg.tensor_parallel_size * pipeline * cfg.context_parallel_size
    return math.lcm(dense, cfg.expert_parallel_size * cfg.expert_tensor_parallel_size * pipeline)


def _plan_parser() -> _Parser:
    parser = _Parser(
        prog=f"{PROGRAM} plan",
        usage=f"{PROGRAM} plan --config FILE [options] [section.field=value ...]",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and all fields")
    parser.add_argument("--world-size", metavar="N", type=_positive(int), help="ranks of the trainer")
    parser.add_argument(
        "--device-memory-gib",
        metavar="G",
        type=_positive(float),
        help=f"memory of one device; default that of this machine's GPU, else {DEFAULT_DEVICE_GIB:g}",
    )
    parser.add_argument(
        "--sequence-length",
        metavar="L",
        type=_positive(int),
        help="tokens of the longest sequence; default data.max_prompt_length + rollout.max_new_tokens",
    )
    parser.add_argument("--json", action="store_true", help="numbers for programs instead of tables")
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); 3 where a plan does not fit."""
    code = 0

    def run(words: Sequence[str]) -> None:
        nonlocal code
        parser = _Parser(prog=PROGRAM, description="Looks at a run before it is started.")
        parser.add_argument("command", choices=list(COMMANDS), help="plan: predict memory and arithmetic")
        code = COMMANDS[parser.parse_args(words[:1]).command](words[1:])

    return run_command(run, argv) or code


if __name__ == "__main__":
    sys.exit(main())
