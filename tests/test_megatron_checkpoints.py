"""Converted checkpoints of every family load at any layout, by our code and by Megatron's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apo_megatron.errors import CheckpointError
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.weights.conversion.hf_to_megatron import hf_to_megatron
from apo_megatron.weights.load import load_megatron_weights
from tests.distributed import run_distributed
from tests.tiny_models import FAMILIES, MOE_FAMILIES, make_tiny_model

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
EP2 = {"expert_parallel_size": 2}
SP = {"sequence_parallel": True}


def _layouts(family: str) -> list[dict[str, Any]]:
    """Layouts of two ranks that the family runs at."""
    if family not in MOE_FAMILIES:
        return [TP2, PP2]
    one_kv_head = family == "qwen3_moe_mixed"
    return [PP2, EP2] if one_kv_head else [TP2 | SP | EP2, PP2, EP2]


def test_converted_checkpoints_load_at_every_layout(tmp_path: Path) -> None:
    cases = []
    for family in FAMILIES:
        hf_path = make_tiny_model(tmp_path / family, family)
        hf_to_megatron(hf_path, tmp_path / f"{family}-megatron", CPUWorld())
        for layout in _layouts(family):
            paths = {"hf_path": str(hf_path), "megatron_path": str(tmp_path / f"{family}-megatron")}
            cases.append({"family": family, "layout": layout, **paths})
    cases.sort(key=lambda case: sorted(case["layout"]))  # changing the layout takes longest
    payload = {"cases": cases}
    ranks = run_distributed(2, "tests.workers.megatron_checkpoints:load_everywhere", payload)
    for case, *results in zip(cases, *ranks, strict=True):
        for result in results:
            assert result["num_weights"] > 5
            assert result["ours"] == [] and result["megatrons"] == [], case
            assert result["agrees"] and result["difference"] < 2e-5, (case, result)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small = make_tiny_model(tmp_path / "small", "qwen2")
    hf_to_megatron(make_tiny_model(tmp_path / "other", "qwen3"), tmp_path / "megatron", CPUWorld())
    with pytest.raises(CheckpointError, match="of another model than model.hf_path"):
        load_megatron_weights([], read_architecture(small), tmp_path / "megatron", None)  # type: ignore[arg-type]
