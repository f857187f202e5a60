"""What the command lines share: reading arguments, and ending with a message instead of a traceback."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pydantic import BaseModel

from apo_megatron.config.loader import load_config
from apo_megatron.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RewardError,
    RolloutError,
    RunInterrupted,
    TrainingError,
    WeightMappingError,
)
from apo_megatron.telemetry.command_parser import CommandParser
from apo_megatron.telemetry.field_help import describe_fields

Config = TypeVar("Config", bound=BaseModel)

USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    WeightMappingError,
    RolloutError,
    RewardError,
    TrainingError,
    OSError,  # a disk that is full, a path that cannot be read or written
)
TRACEBACK_VARIABLE = "APO_MEGATRON_TRACEBACK"
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_STALLED = 75  # of a run that has ended itself because nothing moved (docs/hangs.md)
# Rank 0 mostly fails in the same way. It ends at once, and torchrun then ends the other ranks: one that is
# still there after so many seconds has something of its own to say.
SECONDS_BEFORE_OTHER_RANKS_SPEAK = 3.0


def run_command(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)`` (default: the command line) and return the exit code for ``sys.exit``.

    0 = done, 2 = an error the user can act on (``error: ...`` on stderr), 130 = interrupted (after a signal
    that asks to stop: with the state saved, and how to go on). Any other
    exception is our mistake: traceback and exit code 1. APO_MEGATRON_TRACEBACK=1 shows the traceback of user
    errors too. Does not return where torch.distributed runs and something failed (see ``_leave``).
    """
    previous_hook = sys.excepthook
    sys.excepthook = _report_our_mistake
    try:
        main(sys.argv[1:] if argv is None else argv)
        code = 0
    except USER_ERRORS as error:
        _report_user_error(error)
        code = _leave(EXIT_USER_ERROR)
    except (KeyboardInterrupt, RunInterrupted) as interruption:
        if _rank() == 0:
            print(str(interruption) or "interrupted", file=sys.stderr)
        code = _leave(EXIT_INTERRUPTED)
    sys.excepthook = previous_hook
    return code


def parse_command_line(argv: Sequence[str], config_class: type[Config], program: str) -> Config:
    """``--config FILE [section.field=value ...]`` as a config; ``--help`` lists every field and exits.

    ``program`` is how the command is called, such as ``python -m apo_megatron.train``. Where there are
    checkpoints, ``--resume auto`` stands for ``checkpoint.resume=auto``. Raises ConfigError.
    """
    parsed = config_parser(config_class, program).parse_intermixed_args(argv)
    resume = getattr(parsed, "resume", None)
    overrides = [*parsed.overrides, *([] if resume is None else [f"checkpoint.resume={resume}"])]
    return load_config(config_class, parsed.config, overrides)


def config_parser(config_class: type[BaseModel], program: str) -> CommandParser:
    """The parser of ``parse_command_line``."""
    can_resume = "checkpoint" in config_class.model_fields
    parser = CommandParser(
        prog=program,
        usage=f"{program} --config FILE {'[--resume auto] ' if can_resume else ''}[section.field=value ...]",
        epilog=f"example:\n  {program} --config run.yaml {_example_override(config_class)}\n\n"
        f"fields, with their defaults:\n\n{describe_fields(config_class)}",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="YAML with the settings")
    if can_resume:
        parser.add_argument(
            "--resume",
            choices=("auto", "never"),
            help="go on from the latest checkpoint in train.run_dir, where there is one (checkpoint.resume)",
        )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="settings that go before those of the file; the value is read as YAML",
    )
    return parser


def _example_override(config_class: type[BaseModel]) -> str:
    return "train.num_steps=100" if "train" in config_class.model_fields else "evaluation.num_samples=64"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report_user_error(error: BaseException) -> None:
    rank = _rank()
    if rank != 0:
        time.sleep(SECONDS_BEFORE_OTHER_RANKS_SPEAK)
    if os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(error)
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    print(f"error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr)


def _report_our_mistake(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # Not to sys.stderr: torch.distributed wraps this hook and holds back what is printed until it returns.
    stream = sys.__stderr__
    if "RANK" in os.environ:
        print(f"rank {_rank()}:", file=stream)
    traceback.print_exception(error, file=stream)
    if stream is not None:
        stream.flush()
    _leave(1)


def _leave(code: int) -> int:
    """Give back ``code``, or end the process at once where torch.distributed runs.

    The other ranks may wait for this one in a collective. An orderly exit would destroy the process groups,
    which can wait for them in turn: everybody would hang until the time-out of the collective. Ended at
    once, torchrun sees the exit code and stops the others.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    distributed = sys.modules.get("torch.distributed")  # a --help or a typing error does not import torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        os._exit(code)
    return code
