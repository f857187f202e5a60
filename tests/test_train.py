"""Runs of the whole loop at TP=2: what they leave behind, resuming, and what must stop or skip."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo_megatron.parallel.world import CPUWorld
from apo_megatron.rollout.sample_records import read_step, step_path, step_paths
from apo_megatron.weights.conversion.megatron_to_hf import megatron_to_hf
from tests.distributed import run_distributed
from tests.tiny_models import make_tiny_model

NUM_STEPS = 5


def _rl(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32", "make_vocab_size_divisible_by": 8},
        "data": {"train_path": str(folder / "prompts.jsonl"), "prompts_per_step": 4},
        "train": {
            "run_dir": str(folder / name),
            "num_steps": NUM_STEPS,
            "num_mini_batches": 2,
            "micro_batch_size": 4,
        },
        "parallel": {"tensor_parallel_size": 2},
        "rollout": {"group_size": 4, "max_new_tokens": 5},
        "objective": {"loss_mode": "apo_ratio"},
        "optimizer": {"lr": 5e-3, "lr_warmup_steps": 6},
        "evaluation": {"data_path": None},
        "logging": {"tensorboard": False},
    }
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    model = make_tiny_model(folder / "model", "qwen3")
    # Sorted: a vocabulary comes in another order each time.
    words = sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalnum())
    prompts = [{"prompt": " ".join(words[i : i + 2 + i % 3])} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows = [{**row, "response": f"{words[3]} {words[5]}"} for row in prompts]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = {
        "data_path": str(folder / "prompts.jsonl"),
        "max_problems": 6,
        "num_samples": 8,
        "ks": [1, 4, 8],
        "interval": 2,
        "interval_num_samples": 4,
        "bootstrap_samples": 50,
    }
    payload = {
        "sft": {
            "model": {"hf_path": str(model), "dtype": "float32"},
            "data": {"train_path": str(folder / "demonstrations.jsonl")},
            "train": {
                "run_dir": str(folder / "sft"),
                "num_steps": 30,
                "batch_size": 8,
                "micro_batch_size": 4,
            },
            "parallel": {"tensor_parallel_size": 2},
            "optimizer": {"lr": 5e-3},
        },
        "whole": _rl(folder, "whole", evaluation=evaluation, checkpoint={"export_hf_interval": 2}),
        "interrupted": _rl(folder, "interrupted", checkpoint={"interval": 2, "resume": "auto"}),
        "unmixed": _rl(folder, "unmixed"),
        "not_finite": _rl(
            folder, "not_finite", train={"max_skipped_updates": 3}, checkpoint={"interval": 1, "keep_last": 1}
        ),
    }
    outcome = run_distributed(2, "tests.workers.training:run_all", payload)
    assert outcome[0] == outcome[1]
    return folder, outcome[0]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_leaves_config_metrics_evaluations_picture_and_model(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder = runs[0] / "whole"
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"]["apo_topk"] == 8
    rows = _metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    watched = {
        "reward", "entropy", "support_coverage", "support_coverage_reference", "anchor_mass",
        "anchor_ratio_p50",
        "reference_anchor_mass_p05", "sampled_in_support", "clip_fraction_low", "clip_fraction_high",
        "rectified_clip_fraction", "kl_old", "kl_old_to_reference", "mixed_group_share", "response_length",
        "truncation_rate", "grad_norm", "mismatch/log_prob_gap_max", "time/rollout", "time/update",
        "memory/host_gib",
    }  # fmt: skip
    assert watched <= rows[-1].keys()
    assert rows[0]["mismatch/log_prob_gap_max"] < 1e-4
    # The first mini-batch of the first step is trained at theta = ref, the second is not.
    assert rows[0]["anchor_ratio_p50"] == pytest.approx(1.0, abs=0.1)
    assert "eval/pass_at_4" in rows[1] and "eval/pass_at_1" not in rows[0]
    for tag in ("start", "final"):
        evaluation = json.loads((folder / f"evaluation_{tag}.json").read_text())
        assert list(evaluation["pass_at_k"]) == ["1", "4", "8"]
        assert len(evaluation["num_correct"]) == 6
    assert (folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "finished: step" in (folder / "report.html").read_text()
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "finished"
    assert not list(folder.glob(".*partial"))


def test_a_run_leaves_the_samples_of_every_step(runs: tuple[Path, dict[str, Any]]) -> None:
    folder = runs[0] / "whole" / "rollouts"
    assert list(step_paths(folder)) == list(range(1, NUM_STEPS + 1))
    for row in _metrics(runs[0] / "whole"):
        records = list(read_step(step_path(folder, row["step"])))
        assert len(records) == 16 and {record.step for record in records} == {row["step"]}
        rewards = [record.reward for record in records if record.reward is not None]
        assert sum(rewards) / 16 == pytest.approx(row["reward"])
        assert {version for record in records for version, _ in record.versions} == {row["step"] - 1}
        trained = [record for record in records if record.not_trained is None]
        wrong = [r for r in trained if r.advantage is not None and r.advantage < 0]
        assert wrong and all(r.pulled is not None and set(r.pulled) <= set("01") for r in wrong)
        share = sum((r.pulled or "").count("1") for r in wrong) / sum(r.num_tokens for r in wrong)
        # The metric is the mean of two mini-batches, which have other numbers of tokens.
        assert share == pytest.approx(row["pull_fraction"], abs=0.1)
        assert not any("1" in (r.pulled or "") for r in trained if (r.advantage or 0) >= 0)


def test_a_resumed_run_has_the_same_samples(runs: tuple[Path, dict[str, Any]]) -> None:
    for step in range(1, NUM_STEPS + 1):
        whole, resumed = (
            [
                (r.problem, r.sample, r.token_ids, r.reward, r.advantage, r.not_trained, r.pulled)
                for r in read_step(step_path(runs[0] / name / "rollouts", step))
            ]
            for name in ("whole", "interrupted")
        )
        assert whole == resumed
    records = list(read_step(step_path(runs[0] / "unmixed" / "rollouts", 1)))
    assert {record.not_trained for record in records} == {"equal_rewards"}


def test_training_raises_the_reward_and_the_export_loads_in_transformers(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder = runs[0] / "whole"
    start, final = (
        json.loads((folder / f"evaluation_{tag}.json").read_text())["pass_at_k"]["1"]
        for tag in ("start", "final")
    )
    assert final > start + 0.1
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_resumed_run_ends_with_the_same_weights(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, outcome = runs
    assert "the verifier is gone" in outcome["interrupted"]
    rows = _metrics(folder / "interrupted")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # died in step 4, went on after step 2
    whole, resumed = _weights(folder / "whole" / "hf"), _weights(folder / "interrupted" / "hf")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    learning_rates = [row["learning_rate"] for row in _metrics(folder / "whole")]
    assert [row["learning_rate"] for row in rows] == learning_rates


def test_exports_on_the_way_are_the_weights_of_their_step(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    exported = [path.name for path in sorted((runs[0] / "whole").glob("hf_step_*"))]
    assert exported == ["hf_step_000002", "hf_step_000004"]
    found = _weights(runs[0] / "whole" / exported[0])
    # The interrupted run took the same steps and saved a checkpoint after the second.
    checkpoint = runs[0] / "interrupted" / "checkpoints" / "step_000002"
    megatron_to_hf(checkpoint, tmp_path / "converted", CPUWorld())
    expected, final = _weights(tmp_path / "converted"), _weights(runs[0] / "whole" / "hf")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(found[name], final[name]) for name in found)


def test_steps_without_mixed_groups_are_skipped_and_change_nothing(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder = runs[0]
    rows = _metrics(folder / "unmixed")
    assert [row["skipped_step"] for row in rows] == [1.0] * NUM_STEPS
    assert not any(isinstance(value, float) and math.isnan(value) for row in rows for value in row.values())
    before, after = _weights(folder / "model"), _weights(folder / "unmixed" / "hf")
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    folder, outcome = runs
    assert "max_skipped_updates" in outcome["not_finite"]
    assert "write the name of the last good step_* folder into" in outcome["not_finite"]
    rows = _metrics(folder / "not_finite")
    assert [row["skipped_update"] for row in rows] == [2.0, 2.0]  # 3 are allowed, a step has 2 updates
    latest = (folder / "not_finite" / "checkpoints" / "latest").read_text()
    assert latest == "step_000002"
    for name in (latest, "step_000001"):  # the last good state is kept although keep_last is 1
        assert (folder / "not_finite" / "checkpoints" / name / "state.json").exists()


def test_cold_start_learns_its_demonstrations(runs: tuple[Path, dict[str, Any]]) -> None:
    rows = _metrics(runs[0] / "sft")
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert (runs[0] / "sft" / "hf" / "tokenizer.json").exists()
