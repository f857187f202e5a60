"""What surrounds the training loop: which directories are refused, what a failed export costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from apo_megatron import run as run_module
from apo_megatron.config import RLConfig, SFTConfig
from apo_megatron.errors import CheckpointError, ConfigError
from apo_megatron.run import Run


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "any_rank", lambda flag, parallel: flag)
    monkeypatch.setattr(run_module, "barrier", lambda parallel: None)
    monkeypatch.setattr(run_module, "memory_metrics", lambda parallel: {})
    monkeypatch.setattr(run_module, "HFExporter", MagicMock())


def test_settings_without_effect_are_named_when_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = RLConfig.model_validate(
        {
            "model": {"hf_path": "unused"},
            "data": {"train_path": "unused"},
            "train": {"run_dir": str(tmp_path), "num_steps": 1},
            "objective": {"loss_mode": "cispo", "clip_high": 0.4},
            "logging": {"tensorboard": False},
        }
    )
    run = Run(cfg, SimpleNamespace(is_main=True, rank=0, world=1), title="test")  # type: ignore[arg-type]
    notes: list[str] = []
    monkeypatch.setattr(run, "note", notes.append)
    run.resume(MagicMock())
    assert notes == ["set, but without effect on the methods chosen: objective.clip_high"]


def _run(folder: Path, **checkpoint: Any) -> Run:
    cfg = SFTConfig.model_validate(
        {
            "model": {"hf_path": "unused"},
            "data": {"train_path": "unused"},
            "train": {"run_dir": str(folder), "num_steps": 100},
            "checkpoint": {"resume": "auto", **checkpoint},
            "logging": {"tensorboard": False},
        }
    )
    return Run(cfg, SimpleNamespace(is_main=True, rank=0, world=1), title="test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_steps", "interval", "is_refused"), [(0, 0, False), (1, 0, True), (20, 10, False), (21, 10, True)]
)
def test_a_run_without_a_checkpoint_is_overwritten_only_where_none_could_be_complete(
    tmp_path: Path, num_steps: int, interval: int, is_refused: bool
) -> None:
    metrics = "".join(f'{{"step": {step}}}\n' for step in range(1, num_steps + 1)) + '{"st'
    (tmp_path / "metrics.jsonl").write_text(metrics)
    if is_refused:
        with pytest.raises(ConfigError, match="no checkpoint to go on from"):
            _run(tmp_path, interval=interval)
        assert (tmp_path / "metrics.jsonl").read_text() == metrics
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest").write_text("step_000010")
    _run(tmp_path, interval=interval)


@pytest.mark.parametrize("second", [None, CheckpointError("no room for the checkpoint")])
def test_a_failed_export_does_not_cost_the_checkpoint(tmp_path: Path, second: CheckpointError | None) -> None:
    run = _run(tmp_path, interval=1)
    run._logger = MagicMock()
    run._exporter.poll.side_effect = CheckpointError("no room for the export")  # type: ignore[attr-defined]
    checkpointer = MagicMock()
    checkpointer.finish.side_effect = second
    with pytest.raises(CheckpointError, match="no room for the export") as caught:
        run.finish_step(0, {"loss": 1.0}, MagicMock(most_consecutive_skips=0), checkpointer)
    checkpointer.finish.assert_called_once_with()
    assert second is None or str(second) in str(caught.value)
