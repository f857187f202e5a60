"""What a mesh may be for a model, and what the planner makes of experts and latent attention. Pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apo_megatron.config import RLConfig
from apo_megatron.errors import ConfigError
from apo_megatron.models.expert_config import check_experts, expert_settings
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.layout import check_layout
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.planning.plan import Plan, Setting, make_plan
from apo_megatron.weights.architecture import Architecture
from tests.tiny_models import Family, make_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    families: tuple[Family, ...] = ("qwen2", "qwen3_moe", "deepseek_v2", "deepseek_v3")
    return {name: make_tiny_model(tmp_path_factory.mktemp(name), name, num_layers=4) for name in families}


def architecture_of(models: dict[Family, Path], family: Family) -> Architecture:
    return read_architecture(models[family])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, "tensor_parallel_size=3 must divide num_attention_heads=4"),
        ({"pipeline": 3}, "= 3 must divide num_hidden_layers=4"),
        ({"pipeline": 2, "virtual_pipeline": 4}, "virtual_pipeline_parallel_size=4 = 8 must divide"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(
    sizes: dict[str, Any], message: str, models: dict[Family, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layout(architecture_of(models, "qwen2"), ParallelDims(24, **sizes))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen2", {"expert": 2}, "has no experts"),
        ("qwen3_moe", {"expert": 4}, "expert_parallel_size=4 must divide num_experts=6"),
        ("qwen3_moe", {"expert_tensor": 3}, "must divide the experts' size=40"),
        ("qwen3_moe", {"tensor": 2}, "needs sequence_parallel=true"),
    ],
)
def test_a_mesh_that_does_not_divide_the_experts(
    family: Family, settings: dict[str, Any], message: str, models: dict[Family, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_experts(architecture_of(models, family), ParallelDims(8, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 1, "normalize_top_k": True}, "num_experts_per_tok=1 with weights that sum to 1"),
        ({"num_groups": 3, "top_k_groups": 2, "top_k": 3}, "topk_group=2 with num_experts_per_tok=3"),
    ],
)
def test_routing_that_megatron_does_not_have(
    changes: dict[str, Any], message: str, models: dict[Family, Path]
) -> None:
    architecture = architecture_of(models, "qwen3_moe")
    assert architecture.experts is not None
    changed = replace(architecture, experts=replace(architecture.experts, **changes))
    with pytest.raises(ConfigError, match=message):
        check_experts(changed, ParallelDims(1))


def test_settings_of_experts(models: dict[Family, Path]) -> None:
    cpu = torch.device("cpu")
    assert expert_settings(architecture_of(models, "qwen2"), ParallelDims(1), cpu, False) == {}
    found = expert_settings(architecture_of(models, "qwen3_moe"), ParallelDims(1), cpu, False)
    assert (found["num_moe_experts"], found["moe_router_topk"]) == (6, 2)


def test_lengths_are_multiples_of_what_the_mesh_splits() -> None:
    assert ParallelDims(1).token_multiple == 1
    assert ParallelDims(4, tensor=4).token_multiple == 1
    assert ParallelDims(4, tensor=4, sequence_parallel=True).token_multiple == 4
    both = ParallelDims(8, tensor=2, context=2, sequence_parallel=True)
    assert (both.sequence_multiple, both.token_multiple, both.data) == (4, 8, 2)


def planned(models: dict[Family, Path], family: Family, **parallel: Any) -> Plan:
    cfg = RLConfig.model_validate(
        {
            "model": {"hf_path": str(models[family]), "make_vocab_size_divisible_by": 8},
            "data": {"train_path": "x"},
            "reward": {"name": "countdown"},
            "train": {"run_dir": "x", "num_steps": 1},
            "parallel": parallel,
        }
    )
    world = 2 if parallel else 1
    return make_plan(cfg, Setting(architecture_of(models, family), world, 2**30))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_experts_and_latents_are_planned(family: Family, models: dict[Family, Path]) -> None:
    """More ranks leave less to each, and the whole stays what it is."""
    one = planned(models, family)
    experts = planned(models, family, expert_parallel_size=2)
    stages = planned(models, family, pipeline_parallel_size=2)
    assert 0 < experts.worst.weights < one.worst.weights
    assert sum(stage.parameters.total for stage in stages.stages) == one.worst.parameters.total
    assert one.flops.training == pytest.approx(experts.flops.training)
