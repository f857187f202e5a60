"""RiskPO with D3S; DCPO with knapsack: short runs of two processes, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.distributed import run_distributed
from tests.run_metrics import repeatable_metrics
from tests.tiny_models import make_tiny_model

NUM_STEPS, STOP_IN, GROUP_SIZE, PROMPTS_PER_STEP = 5, 3, 4, 4
METHODS: dict[str, dict[str, Any]] = {
    "riskpo": {
        "objective": {
            "loss_mode": "vanilla",
            "advantage_estimator": "riskpo",
            "riskpo": {"bundle_size": 2},
        },
        "rollout": {"sample_filter": "d3s", "d3s": {"first_share": 0.6}},
    },
    "dcpo": {
        "objective": {"loss_mode": "vanilla", "advantage_estimator": "dcpo"},
        "rollout": {"allocation": "knapsack", "knapsack": {"min_samples": 2, "max_samples": 9}},
    },
}


def _config(folder: Path, method: str, run: str, **checkpoint: Any) -> dict[str, Any]:
    changed = METHODS[method]
    return {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32", "make_vocab_size_divisible_by": 8},
        "data": {
            "train_path": str(folder / "prompts.jsonl"),
            "prompts_per_step": PROMPTS_PER_STEP,
            "max_prompt_length": 16,
        },
        "train": {
            "run_dir": str(folder / f"{method}_{run}"),
            "num_steps": NUM_STEPS,
            "num_mini_batches": 2,
            "max_tokens_per_micro_batch": 32,
        },
        "rollout": {"group_size": GROUP_SIZE, "max_new_tokens": 5, **changed["rollout"]},
        "objective": {"support_telemetry": False, **changed["objective"]},
        "optimizer": {"lr": 2e-3, "adam_eps": 1e-4},
        "checkpoint": {"interval": NUM_STEPS, **checkpoint},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method straight through, and stopped and continued in new processes."""
    folder = tmp_path_factory.mktemp("samplers")
    model = make_tiny_model(folder / "model", "qwen3")
    words = sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalnum())
    prompts = [{"prompt": " ".join(words[i : i + 2 + i % 3])} for i in range(6)]  # known from step 2 on
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    target = "tests.workers.resume:run_all"
    first: list[dict[str, Any]] = [{"config": _config(folder, m, "straight")} for m in METHODS]
    first += [{"config": _config(folder, method, "halves"), "stop_in": STOP_IN} for method in METHODS]
    ended = [run["ended"] for run in run_distributed(2, target, {"runs": first})[0]]
    assert ended[:2] == ["", ""] and all("stopped after step 3" in text for text in ended[2:])
    again = [{"config": _config(folder, method, "halves", resume="auto")} for method in METHODS]
    assert [run["ended"] for run in run_distributed(2, target, {"runs": again})[0]] == ["", ""]
    return folder


def _last_parts(folder: Path, run: str) -> dict[str, Any]:
    state = folder / run / "checkpoints" / f"step_{NUM_STEPS:06d}" / "state.json"
    parts: dict[str, Any] = json.loads(state.read_text())["parts"]
    return parts


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(folder: Path, method: str) -> None:
    found, expected = (f"{method}_{run}" for run in ("halves", "straight"))
    assert repeatable_metrics(folder / found) == repeatable_metrics(folder / expected)
    assert _last_parts(folder, found) == _last_parts(folder, expected)


def test_riskpo_keeps_its_quantiles_and_d3s_lets_go(folder: Path) -> None:
    values = _last_parts(folder, "riskpo_straight")["advantages"]["values"]
    assert values.keys() == {"low", "high"} and values["low"] < values["high"]
    rows = repeatable_metrics(folder / "riskpo_straight")
    filtered = [row["rollout/num_samples_filtered_out"] for row in rows]
    assert filtered[0] >= 3 and filtered[-1] == 0
    assert all(row["wrong_token_fraction"] > 0 for row in rows if not row["skipped_step"])


def test_knapsack_moves_samples_to_where_they_teach_and_dcpo_counts_visits(folder: Path) -> None:
    known = _last_parts(folder, "dcpo_straight")["rollout"]["solve_rates"]
    visits = _last_parts(folder, "dcpo_straight")["advantages"]["values"]
    assert visits.keys() == known.keys()
    assert sum(count for count, _, _ in visits.values()) == NUM_STEPS * PROMPTS_PER_STEP
    assert len(known) == 6 and all(8 <= len(bits) <= 16 and set(bits) <= {*"01"} for bits in known.values())
    rows = repeatable_metrics(folder / "dcpo_straight")
    largest = [row["rollout/largest_group"] for row in rows]
    assert largest[0] == GROUP_SIZE and max(largest) > GROUP_SIZE
    per_step = GROUP_SIZE * PROMPTS_PER_STEP
    for row in rows:
        assert row["response_tokens"] / row["response_length"] == pytest.approx(per_step)
