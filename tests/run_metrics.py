"""What two runs of the same steps must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MEASURED = ("time/", "memory/")


def repeatable_metrics(run_dir: Path, *left_out: str) -> list[dict[str, Any]]:
    """The metrics of every finished step, but for times, memory and ``left_out``."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(_MEASURED) and key not in left_out}
        for row in rows
    ]
