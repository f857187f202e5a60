"""What a training run against SGLang servers must have done."""

from __future__ import annotations

import json
from typing import Any

from tests.countdown_base import CountdownBase

GROUPS, SAMPLES_PER_STEP = 16, 16 * 16
WORKER = "tests.workers.sglang_training:run"


def metrics_of(base: CountdownBase, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base.folder / run / "metrics.jsonl").read_text().splitlines()]


def assert_trained_as_asked(result: dict[str, Any], num_steps: int) -> None:
    """Every step has all its samples, all drawn with the weights of that step."""
    assert result["ended"] == ""
    assert [step["num_samples"] for step in result["steps"]] == [SAMPLES_PER_STEP] * num_steps
    assert [len(set(step["prompts"])) for step in result["steps"]] == [GROUPS] * num_steps
    newest = 0  # a step without a mixed group leaves the weights as they are
    for number, step in enumerate(result["steps"]):
        assert len(step["versions"]) == 1
        assert newest <= step["versions"][0] <= number
        newest = step["versions"][0]


def assert_agreement(rows: list[dict[str, Any]], bound: float) -> None:
    """Engine and actor, at every update and on every trained token. A step may have no mixed group."""
    for name in ("canary_gap", "mismatch/log_prob_gap_mean"):
        gaps = [row[name] for row in rows if name in row]
        assert len(gaps) >= 2 and max(gaps) < bound, name
