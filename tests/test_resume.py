"""A run that stops and goes on in new processes does what one that never stopped does, to the last bit."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.distributed import run_distributed
from tests.run_metrics import repeatable_metrics
from tests.tiny_models import make_tiny_model

NUM_STEPS, STOP_IN = 6, 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"overlap_grad_reduce": True, "overlap_param_gather": True},
    "tp2": {"tensor_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}
# What moves from step to step: a schedule, a state in state.json, and a reference in the shards.
VARIANTS: dict[str, dict[str, Any]] = {
    "dp2": {
        "target_anchor_ratio": 0.9,
        "adaptation_rate": 0.5,
        "final_push_coeff": 1.03,
        "schedule_steps": 5,
        "reference_decay": 0.7,
        "support_mass": 0.5,
    },
    "cp2": {},
}
OTHER_LAYOUT = {"dp2": "tp2", "cp2": "pp2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    model = make_tiny_model(folder / "model", "qwen3")
    words = sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalnum())
    prompts = [{"prompt": " ".join(words[i : i + 2 + i % 3])} for i in range(9)]  # an epoch is 2.25 steps
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def _config(
    folder: Path, name: str, layout: str, variants: dict[str, Any] | None = None, **checkpoint: Any
) -> dict[str, Any]:
    return {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32", "make_vocab_size_divisible_by": 8},
        "data": {"train_path": str(folder / "prompts.jsonl"), "prompts_per_step": 4, "max_prompt_length": 16},
        "train": {
            "run_dir": str(folder / name),
            "num_steps": NUM_STEPS,
            "num_mini_batches": 2,
            "max_tokens_per_micro_batch": 32,
        },
        "parallel": LAYOUTS[layout],
        "rollout": {"group_size": 4, "max_new_tokens": 5},
        "objective": {"loss_mode": "apo_ratio", "apo_variants": variants or {}},
        "optimizer": {"lr": 2e-3, "lr_warmup_steps": 4, "lr_decay_style": "cosine", "adam_eps": 1e-4},
        "evaluation": {
            "data_path": str(folder / "prompts.jsonl"),
            "num_samples": 4,
            "ks": [1, 4],
            "interval": 2,
            "interval_num_samples": 4,
            "bootstrap_samples": 10,
        },
        "checkpoint": {"interval": 2, "keep_last": 1, **checkpoint},
        "logging": {"tensorboard": False},
    }


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def _assert_same_rollouts(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for step_found, step_expected in zip(found, expected, strict=True):
        for (prompt, tensors), (same_prompt, same_tensors) in zip(step_found, step_expected, strict=True):
            assert prompt == same_prompt
            assert all(torch.equal(a, b) for a, b in zip(tensors, same_tensors, strict=True))


@pytest.mark.parametrize("layout", OTHER_LAYOUT)
def test_three_steps_and_three_in_new_processes_equal_six(folder: Path, layout: str) -> None:
    variants = VARIANTS[layout]
    straight, halves, moved = f"{layout}_straight", f"{layout}_halves", f"{layout}_moved"
    first = [
        {"config": _config(folder, straight, layout, variants)},
        {"config": _config(folder, halves, layout, variants), "stop_in": STOP_IN},
    ]
    target = "tests.workers.resume:run_all"
    whole, begun = run_distributed(2, target, {"runs": first})[0]
    assert whole["ended"] == ""
    saved = folder / halves / "checkpoints" / "step_000003"
    assert f"SIGTERM received: stopped after step 3 of 6, the state is saved in {saved}" in begun["ended"]
    assert "--resume auto" in begun["ended"]
    outcomes = [json.loads((folder / name / "outcome.json").read_text()) for name in (straight, halves)]
    assert [outcome["outcome"] for outcome in outcomes] == ["finished", "interrupted"]
    assert begun["ended"] in outcomes[1]["message"]
    assert [path.name for path in sorted(saved.parent.iterdir())] == ["latest", "step_000003"]
    shutil.copytree(folder / halves, folder / moved)

    again = [{"config": _config(folder, halves, layout, variants, resume="auto")}]
    resumed = run_distributed(2, target, {"runs": again})[0][0]
    assert resumed["ended"] == ""
    _assert_same_rollouts(begun["rollouts"] + resumed["rollouts"], whole["rollouts"])
    assert repeatable_metrics(folder / halves) == repeatable_metrics(folder / straight)
    expected = _weights(folder / straight)
    for name, value in _weights(folder / halves).items():
        assert torch.equal(value, expected[name]), name
    evaluations = [json.loads((folder / n / "evaluation_final.json").read_text()) for n in (halves, straight)]
    assert evaluations[0] == evaluations[1]

    elsewhere = [{"config": _config(folder, moved, OTHER_LAYOUT[layout], variants, resume="auto")}]
    assert run_distributed(2, target, {"runs": elsewhere})[0][0]["ended"] == ""
    for name, value in _weights(folder / moved).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    if variants:
        _assert_coefficients_moved(repeatable_metrics(folder / straight), variants)
        last = json.loads((folder / halves / "checkpoints" / "step_000006" / "state.json").read_text())
        # The reference comes out of the checkpoint, and nothing shows that another model is the same.
        assert last["reference"] is None and "model.hf_path" in last["settings"]


def _assert_coefficients_moved(rows: list[dict[str, Any]], variants: dict[str, Any]) -> None:
    end, num_steps = variants["final_push_coeff"], variants["schedule_steps"]
    push = [1.05 + (end - 1.05) * min(step / num_steps, 1.0) for step in range(NUM_STEPS)]
    assert [row["apo/push_coeff"] for row in rows] == pytest.approx(push, rel=1e-12)
    assert rows[0]["apo/pull_coeff"] == 0.1 and len({row["apo/pull_coeff"] for row in rows}) == NUM_STEPS
    for row, following in itertools.pairwise(rows):
        error = 1 - row["apo/anchor_mass_ratio"] / variants["target_anchor_ratio"]
        expected = row["apo/pull_coeff"] * math.exp(variants["adaptation_rate"] * error)
        assert following["apo/pull_coeff"] == pytest.approx(min(max(expected, 0.01), 0.2), rel=1e-12)


def test_resuming_where_there_is_no_checkpoint_starts_anew(folder: Path) -> None:
    config = _config(folder, "anew", "tp2", resume="auto", interval=10)
    config["train"]["num_steps"] = 2
    config["optimizer"]["lr_warmup_steps"] = 0
    (folder / "anew").mkdir()
    (folder / "anew" / "metrics.jsonl").write_text('{"step": 1, "reward": 9}\n{"step": 7}\n{"ste')
    run_distributed(2, "tests.workers.resume:run_all", {"runs": [{"config": config}]})
    rows = repeatable_metrics(folder / "anew")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["reward"] != 9
    assert (folder / "anew" / "evaluation_start.json").exists()


def test_a_failed_last_evaluation_does_not_cost_the_end_of_the_run(folder: Path) -> None:
    config = _config(folder, "unmeasured", "tp2")
    config["train"]["num_steps"] = 2
    config["optimizer"]["lr_warmup_steps"] = 0
    run = {"config": config, "fails_at_end": True}
    ((outcome,), _) = run_distributed(2, "tests.workers.resume:run_all", {"runs": [run]})
    assert outcome["ended"] == "RolloutError: no server"
    assert (folder / "unmeasured" / "checkpoints" / "latest").read_text().strip() == "step_000002"
    assert (folder / "unmeasured" / "hf" / "model.safetensors").exists()


def test_another_model_than_at_the_beginning_is_refused(folder: Path) -> None:
    config = _config(folder, "replaced", "tp2", interval=1)
    config["model"]["hf_path"] = str(folder / "replaced_model")
    shutil.copytree(folder / "model", folder / "replaced_model")
    target = "tests.workers.resume:run_all"
    run_distributed(2, target, {"runs": [{"config": config, "stop_in": 1}]})
    make_tiny_model(folder / "replaced_model", "qwen3", seed=1)
    config["checkpoint"]["resume"] = "auto"
    for outcome in run_distributed(2, target, {"runs": [{"config": config}]}):
        assert "the model there has changed since the run began" in outcome[0]["ended"]
