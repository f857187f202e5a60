"""How a run ended, in a file that readers find later: run_dir/outcome.json."""

from __future__ import annotations

import json
import time
from pathlib import Path

from apo_megatron.errors import RunInterrupted
from apo_megatron.files import write_atomically

OUTCOME_FILE = "outcome.json"


def forget_outcome(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / OUTCOME_FILE).unlink(missing_ok=True)


def write_outcome(run_dir: Path, error: BaseException | None) -> None:
    """``outcome`` (finished, interrupted, failed), ``message``, and ``time`` in seconds since the epoch.

    After an error it does not raise: a disk that is full must not hide what happened.
    """
    if error is None:
        kind, message = "finished", ""
    else:
        kind = "interrupted" if isinstance(error, RunInterrupted | KeyboardInterrupt) else "failed"
        message = f"{type(error).__name__}: {error}"
    text = json.dumps({"outcome": kind, "message": message, "time": round(time.time(), 3)})
    try:
        write_atomically(run_dir / OUTCOME_FILE, text)
    except OSError:
        if error is None:
            raise
