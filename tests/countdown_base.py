"""A Countdown model that solves a few per cent, cold-started in seconds: groups are mixed, so runs learn."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNTDOWN = ROOT / "examples" / "countdown"


@dataclass(frozen=True)
class CountdownBase:
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "base" / "hf"

    def config(self, run: str, **sections: Any) -> dict[str, Any]:
        """A short APO run at TP=2 into ``folder``/``run``, for RLConfig; ``sections`` override."""
        config: dict[str, Any] = {
            "model": {"hf_path": str(self.model), "dtype": "float32", "make_vocab_size_divisible_by": 1},
            "data": {
                "train_path": str(self.folder / "data" / "train.jsonl"),
                "prompts_per_step": 16,
                "max_prompt_length": 16,
            },
            "train": {
                "run_dir": str(self.folder / run),
                "num_steps": 3,
                "num_mini_batches": 2,
                "micro_batch_size": 64,
            },
            "parallel": {"tensor_parallel_size": 2},
            "rollout": {"group_size": 16, "max_new_tokens": 6},
            "optimizer": {"lr": 1e-3},
            "logging": {"tensorboard": False},
            "checkpoint": {"export_hf": True},
        }
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        return config


def make_countdown_base(folder: Path) -> CountdownBase:
    """Data and base model, by the commands of the example (about 15 s on one core)."""
    prepare = ("--num-demonstrations", "38400", "--num-train", "2000", "--num-heldout", "16")
    run_example(str(COUNTDOWN / "prepare.py"), "--out", str(folder / "data"), *prepare)
    run_example(
        "-m", "apo_megatron.sft", "--config", str(COUNTDOWN / "sft.yaml"),
        f"model.hf_path={folder / 'data' / 'init'}", f"data.train_path={folder / 'data' / 'sft.jsonl'}",
        f"train.run_dir={folder / 'base'}", "train.num_steps=150", "parallel.tensor_parallel_size=1",
        "optimizer.lr=4e-3", "optimizer.lr_warmup_steps=10",
    )  # fmt: skip
    return CountdownBase(folder)


def run_example(*words: str) -> None:
    """``python WORDS`` in the root of the checkout, without GPUs; fails the test where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
