"""``apo-doctor check``: everything that can be known of this machine in seconds, without network."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from apo_megatron.config import RLConfig, load_config
from apo_megatron.diagnosis.finding import Finding, Section, as_data, count, print_findings
from apo_megatron.diagnosis.gpus import check_gpus
from apo_megatron.diagnosis.host import check_host
from apo_megatron.diagnosis.packages import check_packages
from apo_megatron.diagnosis.storage import check_storage
from apo_megatron.telemetry.command_parser import CommandParser

PROGRAM = "apo-doctor check"
EXIT_PROBLEM = 3
_RUN = Section("Run")
_SECONDS_FOR_RUN = 120.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def check(words: Sequence[str]) -> int:
    """Print the findings; 3 where one is a problem. Raises ConfigError for wrong words."""
    options = command_parser().parse_intermixed_args(words)
    findings = find(options)
    if options.json:
        print(json.dumps(as_data(findings), indent=2))
    else:
        print_findings(Console(highlight=False), findings)
    return EXIT_PROBLEM if count(findings, "problem") else 0


def find(options: argparse.Namespace) -> list[Finding]:
    """All findings, in the order in which they are printed. Raises ConfigError for the configuration."""
    cfg = load_config(RLConfig, options.config, options.overrides) if options.config else None
    run_dir = options.run_dir or (cfg.train.run_dir if cfg else "runs")
    with ThreadPoolExecutor(1) as beside:  # what the run reads takes seconds, in a process of its own
        run = beside.submit(check_run, options) if cfg else None
        findings = [
            *check_packages(options.sglang_python),
            *check_gpus(),
            *check_host(),
            *check_storage(run_dir),
        ]
        return findings + (run.result() if run else [])


def check_run(options: argparse.Namespace) -> list[Finding]:
    """The findings of ``run_config.py``, from a process that is kept from the network."""
    words = [str(options.config), str(options.world_size), *options.overrides]
    command = [sys.executable, "-m", "apo_megatron.diagnosis.run_config", *words]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_FOR_RUN, env={**os.environ, **_OFFLINE}
        )
    except subprocess.TimeoutExpired:
        return [
            _RUN.warning(
                "data", f"not read after {_SECONDS_FOR_RUN:.0f} s", "large data takes long: start the run"
            )
        ]
    if result.returncode != 0:
        why = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return [
            _RUN.problem(
                "run", f"{options.config}: {why}", f"the whole message: python {' '.join(command[1:])}"
            )
        ]
    return [Finding(**finding) for finding in json.loads(result.stdout.splitlines()[-1])]


def command_parser() -> CommandParser:
    """Of this command line."""
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [options] [--config FILE [section.field=value ...]]",
        description="Looks at packages, GPUs, limits, ports and disks of this machine, without network.",
        epilog=f"example:\n  {PROGRAM} --config run.yaml --world-size 8\n\n"
        f"exit codes: 0 = can run (warnings included), {EXIT_PROBLEM} = a problem was found, 2 = wrong words",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="check what this run needs, too")
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        default=0,
        help="its ranks (default: the fewest that its layout takes)",
    )
    parser.add_argument(
        "--run-dir", metavar="DIR", help="measure this folder (default: train.run_dir of --config, or runs)"
    )
    parser.add_argument(
        "--sglang-python", metavar="PYTHON", help="interpreter of SGLang's environment (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="for programs instead of people")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of the run")
    return parser
