"""What goes wrong with checkpoints ends in a message on every rank, and costs no older checkpoint."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed import DistributedRun, run_distributed
from tests.tiny_models import make_tiny_model


def test_failed_saves_and_damaged_checkpoints(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    payload = {
        "model_path": str(make_tiny_model(tmp_path / "model", "qwen2")),
        "folder": str(tmp_path / "checkpoints"),
        "sequences": [torch.randint(2, 107, (n,), generator=generator) for n in (5, 4, 6, 3)],
    }
    ranks = run_distributed(2, "tests.workers.checkpoint_errors:failures", payload)
    assert {name: found for name, found in ranks[0].items() if found != ranks[1][name]} == {}
    found: dict[str, Any] = ranks[0]
    for is_async in (False, True):
        for name, wanted in {
            "disk full before": "File too large",
            "disk full within": "rank 1: [Errno 27] File too large",
            "metadata": "No space left on device: 'finish'",
            "config": "No space left on device: 'save_config'",
            "common state": "common.pt: [Errno 28] No space left on device",
            **({"no permission": "Permission denied"} if os.geteuid() == 0 else {}),
        }.items():
            message, left = found[f"{name} {is_async}"]
            assert "step_000002 could not be written: " in message and wanted in message, (name, message)
            assert left == ["latest", "step_000001"]
    assert "step_000002 cannot be loaded into this model: rank" in found["shard"]
    assert "common.pt: damaged, or holds more than tensors and plain values" in found["common"]
    assert ".metadata: names pathlib" in found["metadata"]
    assert ".metadata: embedding.word_embeddings.weight is no tensor" in found["no tensor"]
    assert "state.json: damaged (KeyError" in found["schedule"]
    assert "rank_00001.json: damaged" in found["random state"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model", "qwen2", num_layers=1)
    rows = [{"prompt": "w2 w3", "response": f"w{i} w5"} for i in range(6, 40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"hf_path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"train_path": str(tmp_path / "data.jsonl")},
        "train": {"run_dir": str(tmp_path / "run"), "num_steps": 10**6, "batch_size": 8},
        "checkpoint": {"interval": 3, "keep_last": 2},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "sft.yaml"


def _num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_command_is_stopped_by_a_signal_and_refuses_a_truncated_checkpoint(config: Path) -> None:
    target, run_dir = "tests.workers.checkpoint_errors:sft_main", config.parent / "run"
    argv = ["--config", str(config), "--resume", "auto"]
    with DistributedRun(2, target, {"argv": argv}) as run:
        deadline = time.monotonic() + 60
        while _num_steps(run_dir) < 7 and time.monotonic() < deadline:
            time.sleep(0.02)
        run.kill(1, signal.SIGUSR1)
        codes = run.exit_codes(60)
        assert 130 in codes and set(codes) <= {130, None}, run.log(0) + run.log(1)
        shown = run.log(0)
    latest = (run_dir / "checkpoints" / "latest").read_text()
    assert f"SIGUSR1 received: stopped after step {int(latest[5:])} of 1000000" in shown
    assert _num_steps(run_dir) == int(latest[5:])

    shard = run_dir / "checkpoints" / latest / "__0_0.distcp"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size // 2)
    with DistributedRun(2, target, {"argv": argv}) as run:
        codes = run.exit_codes(60)
        assert codes[0] == 2, run.log(0)
        shown = run.log(0)
    assert f"error: {shard}: {size // 2} bytes found, {size} bytes expected" in shown
    assert "Write the name of an older step_* folder" in shown
    assert (run_dir / "checkpoints" / "latest").read_text() == latest
