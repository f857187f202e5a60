"""A user's mistake ends in one message that says what and where, a non-zero exit, and no training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import ROOT, run_distributed
from tests.tiny_models import make_tiny_model

# Scenario -> what its message must contain.
EXPECTED = {
    "unknown key": ["ConfigError", "objective.apo_topp", "apo_topk"],
    "wrong type": ["ConfigError", "train.num_steps", "many"],
    "clipped from the start": ["ConfigError", "apo_push_coeff - apo_pull_coeff", "0.75", "0.8"],
    "budget that ranks cannot share": ["ConfigError", "max_tokens_per_micro_batch=1001", "multiple of 4"],
    "layout does not divide the processes": ["ConfigError", "tensor_parallel_size=3", "2 processes"],
    "heads do not divide": ["ConfigError", "tensor_parallel_size", "num_attention_heads", "3"],
    "layers do not divide": ["ConfigError", "pipeline_parallel_size", "num_hidden_layers", "3"],
    "no model": ["nowhere", "config.json"],
    "no weights": ["CheckpointError", "safetensors"],
    "truncated weights": ["CheckpointError", "model.safetensors", "truncated"],
    "vocabulary mismatch": ["ConfigError", "tokenizer", "106", "90"],
    "no data": ["DataError", "missing.jsonl"],
    "empty data": ["DataError", "empty.jsonl"],
    "malformed row": ["DataError", "malformed.jsonl:2"],
    "row without a column": ["DataError", "incomplete.jsonl:2", "target"],
    "run directory in use": ["ConfigError", "train.run_dir", "metrics.jsonl", "resume"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_tiny_model(folder / "model", "qwen3")
    make_tiny_model(
        folder / "three_heads", "qwen3", hidden_size=60, num_heads=3, num_kv_heads=3, num_layers=3
    )
    make_tiny_model(folder / "small_vocabulary", "qwen3", vocab_size=90)
    for name in ("no_weights", "truncated"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, folder / "small_vocabulary")
    words = " ".join(json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"].keys())
    good = json.dumps({"prompt": words.split()[5], "numbers": [1, 2, 3], "target": 6})
    rows = {
        "good": [good] * 4,
        "empty": [],
        "malformed": [good, good[:-5]],
        "incomplete": [good, json.dumps({"prompt": words.split()[5], "numbers": [1, 2, 3]})],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}\n")
    config = {
        "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
        "data": {"train_path": str(folder / "good.jsonl"), "prompts_per_step": 2},
        "train": {"run_dir": str(folder / "run"), "num_steps": 2},
        "rollout": {"group_size": 2, "max_new_tokens": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_every_mistake_has_its_message(folder: Path) -> None:
    scenarios = {
        "unknown key": ["objective.apo_topp=4"],
        "wrong type": ["train.num_steps=many"],
        "clipped from the start": ["objective.apo_pull_coeff=0.3"],
        "budget that ranks cannot share": [
            "parallel.context_parallel_size=2",
            "train.max_tokens_per_micro_batch=1001",
        ],
        "layout does not divide the processes": ["parallel.tensor_parallel_size=3"],
        "heads do not divide": [
            f"model.hf_path={folder / 'three_heads'}",
            "parallel.tensor_parallel_size=2",
        ],
        "layers do not divide": [
            f"model.hf_path={folder / 'three_heads'}",
            "parallel.pipeline_parallel_size=2",
        ],
        "no model": [f"model.hf_path={folder / 'nowhere'}"],
        "no weights": [f"model.hf_path={folder / 'no_weights'}"],
        "truncated weights": [f"model.hf_path={folder / 'truncated'}"],
        "vocabulary mismatch": [f"model.hf_path={folder / 'small_vocabulary'}"],
        "no data": [f"data.train_path={folder / 'missing.jsonl'}"],
        "empty data": [f"data.train_path={folder / 'empty.jsonl'}"],
        "malformed row": [f"data.train_path={folder / 'malformed.jsonl'}"],
        "row without a column": [f"data.train_path={folder / 'incomplete.jsonl'}"],
        "run directory in use": [f"train.run_dir={folder / 'used'}"],
    }
    assert scenarios.keys() == EXPECTED.keys()
    for number, overrides in enumerate(scenarios.values()):
        if not any("run_dir" in override for override in overrides):
            overrides.append(f"train.run_dir={folder / f'run{number}'}")
    payload = {"config": str(folder / "config.yaml"), "scenarios": scenarios}
    for messages in run_distributed(2, "tests.workers.bad_input:messages", payload):
        wrong = {
            name: messages[name]
            for name, parts in EXPECTED.items()
            if not all(p in messages[name] for p in parts)
        }
        assert not wrong, "\n\n".join(f"{name}: {message}" for name, message in wrong.items())
    assert (folder / "used" / "metrics.jsonl").read_text() == "{}\n"  # an earlier run is left alone


def test_the_command_exits_with_2_and_one_message(folder: Path) -> None:
    command = [sys.executable, "-m", "apo_megatron.train", "--config", str(folder / "config.yaml")]
    result = subprocess.run(
        [*command, f"model.hf_path={folder / 'truncated'}", f"train.run_dir={folder / 'run_command'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "error: " in result.stderr and "model.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
