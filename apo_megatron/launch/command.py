"""The launcher's command line: that of the trainer, and what concerns the cluster."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from apo_megatron.config import RLConfig
from apo_megatron.telemetry.command import config_parser, parse_command_line
from apo_megatron.telemetry.command_parser import CommandParser

PROGRAM = "python -m apo_megatron.launch.ray"


@dataclass(frozen=True)
class LaunchOptions:
    """What is no setting of the run: the same run may start with others every time."""

    address: str | None
    num_trainers: int | None
    wait_minutes: float
    wait_for_nodes: bool
    max_failures: int


def read_command_line(words: Sequence[str]) -> tuple[LaunchOptions, RLConfig]:
    """Options of the launcher may stand anywhere among those of the trainer. Raises ConfigError."""
    parser = launch_parser()
    parser.refuse_unknown_options(words, config_parser(RLConfig, PROGRAM).options)
    found, rest = parser.parse_known_args(words)
    options = LaunchOptions(
        found.address, found.num_trainers, found.wait_minutes, found.wait_for_nodes, found.max_failures
    )
    if found.help:
        print(parser.format_help())
        rest.append("--help")  # of the trainer, which ends the program
    return options, parse_command_line(rest, RLConfig, PROGRAM)


def command_to_go_on(words: Sequence[str]) -> str:
    """The command line with ``--resume auto``."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != "--resume" and not word.startswith("--resume="):
            kept.append(word)
        skip = word == "--resume"
    return f"{PROGRAM} {shlex.join(kept)} --resume auto"


def launch_parser() -> CommandParser:
    """Of what is no setting of the run."""
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --config FILE [--num-trainers N] [option ...] [section.field=value ...]",
        description="Runs the trainer, and SGLang servers where rollout.engine=sglang, on a Ray cluster.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this, and every setting of a run")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the cluster's head; local = a new cluster on this machine (default: RAY_ADDRESS, else the "
        "cluster that runs on this machine, else a new one)",
    )
    parser.add_argument(
        "--num-trainers",
        metavar="N",
        type=positive_integer,
        help="trainer ranks, a GPU each, or a CPU where the cluster has no GPUs (default: all GPUs that the "
        "servers leave; without GPUs one copy of the model)",
    )
    parser.add_argument(
        "--wait-minutes",
        metavar="M",
        type=positive_number,
        default=30.0,
        help="how long to wait for resources (default: 30)",
    )
    parser.add_argument(
        "--wait-for-nodes",
        action="store_true",
        help="more nodes may join (autoscaling, nodes that still start): wait for what the cluster lacks",
    )
    parser.add_argument(
        "--max-failures",
        metavar="N",
        type=non_negative_integer,
        default=0,
        help="restart the trainer from its latest checkpoint after so many failures (default: 0)",
    )
    return parser


def positive_integer(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected 1 or more")
    return int(text)


def non_negative_integer(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"found {text}, expected 0 or more")
    return int(text)


def positive_number(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text}, expected more than 0")
    return float(text)
