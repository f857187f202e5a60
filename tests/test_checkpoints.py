"""A resumed actor takes the same updates as one that never stopped, on several layouts."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed import run_distributed
from tests.tiny_models import make_tiny_model

PP2_VPP2 = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}
CASES = [
    {"layout": {"distributed_optimizer": True}, "dtype": "float32", "updates_before": 1},  # DP2
    {"layout": {"distributed_optimizer": False}, "dtype": "float32", "updates_before": 0},
    {"layout": {"tensor_parallel_size": 2}, "dtype": "bfloat16", "updates_before": 1},
    {"layout": {**PP2_VPP2, "distributed_optimizer": True}, "dtype": "float32", "updates_before": 1},
    {"layout": {**PP2_VPP2, "distributed_optimizer": False}, "dtype": "float32", "updates_before": 1},
]


def test_resumed_actor_goes_on_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    payload = {
        "model_path": str(make_tiny_model(tmp_path / "model", "qwen2", num_layers=4)),
        "folder": str(tmp_path / "checkpoints"),
        "sequences": [torch.randint(2, 107, (n,), generator=generator) for n in (6, 9, 4, 7, 5)],
        "cases": CASES,
    }
    results = run_distributed(2, "tests.workers.checkpoints:save_and_resume", payload)[0]
    for case, result in zip(CASES, results, strict=True):
        assert result["start"] == case["updates_before"]
        assert result["difference"] == 0.0, case
        settings, beyond = result["refusals"]
        assert "lr: 1.0 there, 2.0 here" in settings and "train.num_steps=-1" in beyond
