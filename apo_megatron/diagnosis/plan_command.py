"""``apo-doctor plan``: memory and arithmetic of a run, from its configuration and the model's config.json.

The weights need not be there; nothing is allocated, nothing communicates. What is predicted, and how it was
checked: docs/planning.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence

from rich.console import Console

from apo_megatron.config import ParallelConfig, RLConfig
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.device_memory import gpu_memory_bytes
from apo_megatron.planning.plan import Setting, make_plan
from apo_megatron.planning.proposals import propose
from apo_megatron.planning.report import plan_as_data, print_plan, print_proposals
from apo_megatron.telemetry.command import config_parser, parse_command_line
from apo_megatron.telemetry.command_parser import CommandParser

PROGRAM = "apo-doctor plan"
EXIT_DOES_NOT_FIT = 3
DEFAULT_DEVICE_GIB = 80.0  # where there is no GPU to look at
TABLE_WIDTH = 110  # columns of three stages; where nobody looks rich assumes less
_GIB = 2**30


def plan(words: Sequence[str]) -> int:
    """Print the plan and layouts that fit; the exit code says whether the plan does. Raises ConfigError."""
    parser = command_parser()
    parser.refuse_unknown_options(words, config_parser(RLConfig, PROGRAM).options)
    options, rest = parser.parse_known_args(words)
    if options.help:
        print(parser.format_help())
        rest.append("--help")  # of the configuration, which ends the program
    cfg = parse_command_line(rest, RLConfig, PROGRAM)
    gpu_bytes = gpu_memory_bytes() or DEFAULT_DEVICE_GIB * _GIB
    setting = Setting(
        architecture=read_architecture(cfg.model.hf_path),
        world=options.world_size or default_world(cfg.parallel),
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


def default_world(cfg: ParallelConfig) -> int:
    """That of torchrun, or the fewest ranks on which the mesh exists."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    pipeline = cfg.pipeline_parallel_size
    dense = cfg.tensor_parallel_size * pipeline * cfg.context_parallel_size
    return math.lcm(dense, cfg.expert_parallel_size * cfg.expert_tensor_parallel_size * pipeline)


def command_parser() -> CommandParser:
    """Of what is no setting of the run."""
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --config FILE [options] [section.field=value ...]",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this and all fields")
    parser.add_argument("--world-size", metavar="N", type=positive(int), help="ranks of the trainer")
    parser.add_argument(
        "--device-memory-gib",
        metavar="G",
        type=positive(float),
        help=f"memory of one device; default that of this machine's GPU, else {DEFAULT_DEVICE_GIB:g}",
    )
    parser.add_argument(
        "--sequence-length",
        metavar="L",
        type=positive(int),
        help="tokens of the longest sequence; default data.max_prompt_length + rollout.max_new_tokens",
    )
    parser.add_argument("--json", action="store_true", help="numbers for programs instead of tables")
    return parser


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse
