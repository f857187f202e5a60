"""Rollouts and trainer agree: one set of weights, one temperature, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.tiny_models import Family, make_tiny_model

LOG_PROB_BOUND = 1e-4
FAVOURED = [5, 17, 42]
_EP2 = {"expert_parallel_size": 2}
CASES: list[tuple[Family, int, list[dict[str, Any]]]] = [
    ("qwen2", 1, [{}]),
    ("qwen2", 2, [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]),
    ("qwen3_moe", 2, [_EP2]),
    ("deepseek_v3", 2, [{**_EP2, "tensor_parallel_size": 2, "sequence_parallel": True}]),
]


@pytest.mark.parametrize(("family", "world", "layouts"), CASES, ids=["qwen2-1", "qwen2-2", "moe", "mla"])
def test_engine_follows_the_sharded_actor(
    family: Family, world: int, layouts: list[dict[str, Any]], tmp_path: Path
) -> None:
    payload = {
        "model_path": str(make_tiny_model(tmp_path, family)),
        "layouts": layouts,
        "prompts": [
            [3, 9, 11],
            [7, 8, 30, 31, 32, 60],
            [4],
        ],  # of unequal length: the engine pads on the left
        "favoured": FAVOURED,
        "temperature": 0.7,
        "num_updates": 25,
    }
    for rank_results in run_distributed(world, "tests.workers.engine_agreement:compare", payload):
        for result in rank_results:
            assert result["gap_before"] < LOG_PROB_BOUND
            assert result["gap_after"] < LOG_PROB_BOUND
            assert max(result["canary_gaps"]) < LOG_PROB_BOUND
            assert "rollout.max_canary_gap=0.1" in result["refused"]
            assert result["stale_is_unchanged"]
            # The updates taught one answer; samples show it only if the engine got the new weights.
            assert [answer[:3] for answer in result["favoured_after"]].count(FAVOURED) >= 3
