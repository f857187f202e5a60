"""Checkpoints hold the state of the save, for its own layout and for others; who may not read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from apo_megatron.actor.adam_state import load_optimizer_state
from apo_megatron.actor.checkpoint_state import (
    CheckpointState,
    as_json,
    check_resumable,
    fixed_settings,
)
from apo_megatron.config import RLConfig
from apo_megatron.errors import CheckpointError
from tests.distributed import run_distributed
from tests.tiny_models import Family, make_tiny_model

PP2_VPP2: dict[str, Any] = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}
DP2: dict[str, Any] = {}
TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
CP2: dict[str, Any] = {"context_parallel_size": 2}
WHOLE = {"distributed_optimizer": False}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# With a "decay" there is a moving average of the weights beside them.
CASES: list[dict[str, Any]] = [
    {"layout": DP2, "dtype": "float32", "updates_before": 1, "async_save": True},
    {"layout": WHOLE, "dtype": "float32", "updates_before": 0},
    {"layout": TP2, "dtype": "bfloat16", "updates_before": 1, "decay": 0.8},
    {"layout": PP2_VPP2, "dtype": "float32", "updates_before": 1},
    {"layout": PP2_VPP2 | WHOLE, "dtype": "float32", "updates_before": 1, "async_save": True, "decay": 0.8},
    {"layout": DP2, "other_layout": TP2, "dtype": "float32", "updates_before": 2, "decay": 0.8},
    {
        "layout": TP2 | {"sequence_parallel": True},
        "other_layout": PP2,
        "dtype": "float32",
        "updates_before": 2,
        "decay": 0.8,
    },
    {"layout": PP2, "other_layout": PP2_VPP2, "dtype": "float32", "updates_before": 1},
    {
        "layout": PP2_VPP2 | WHOLE,
        "other_layout": TP2 | WHOLE,
        "dtype": "float32",
        "updates_before": 1,
        "decay": 0.8,
    },
    {"layout": TP2, "other_layout": DP2, "dtype": "bfloat16", "updates_before": 1},
    {"layout": CP2 | OVERLAP, "dtype": "bfloat16", "updates_before": 1, "async_save": True, "decay": 0.8},
    {"layout": DP2 | OVERLAP, "other_layout": CP2, "dtype": "float32", "updates_before": 2},
]

EP2: dict[str, Any] = {"expert_parallel_size": 2}
EXPERT_CASES: list[dict[str, Any]] = [
    {"layout": EP2, "dtype": "float32", "updates_before": 1, "decay": 0.8},
    {"layout": EP2 | WHOLE, "dtype": "float32", "updates_before": 0},
    {"layout": EP2, "other_layout": DP2, "dtype": "float32", "updates_before": 1},
    {"layout": PP2, "other_layout": EP2, "dtype": "float32", "updates_before": 1, "decay": 0.8},
    {"layout": DP2 | WHOLE, "other_layout": EP2 | WHOLE, "dtype": "float32", "updates_before": 1},
]
# The first of two stages has no experts.
DENSE_STAGE_CASES: list[dict[str, Any]] = [
    {"layout": PP2, "dtype": "float32", "updates_before": 1},
    {"layout": PP2 | WHOLE, "dtype": "float32", "updates_before": 1},
    {"layout": PP2 | WHOLE, "dtype": "bfloat16", "updates_before": 1, "decay": 0.8},
    {"layout": PP2, "other_layout": EP2, "dtype": "float32", "updates_before": 1, "decay": 0.8},
    {"layout": EP2, "other_layout": PP2, "dtype": "float32", "updates_before": 1},
    {"layout": PP2 | WHOLE, "other_layout": EP2 | WHOLE, "dtype": "float32", "updates_before": 1},
]


@pytest.fixture
def payload(tmp_path: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    # 101 words: padded to 104 rows on one tensor rank, to 112 on two.
    model = make_tiny_model(tmp_path / "model", "qwen2", num_layers=4, vocab_size=101)
    return {
        "model_path": str(model),
        "folder": str(tmp_path / "checkpoints"),
        "sequences": [torch.randint(2, 101, (n,), generator=generator) for n in (6, 9, 4, 7, 5)],
    }


@pytest.mark.parametrize(
    ("family", "cases"),
    [("qwen2", CASES), ("qwen3_moe", EXPERT_CASES), ("deepseek_v3", DENSE_STAGE_CASES)],
)
def test_resumed_actor_goes_on_exactly(
    payload: dict[str, Any], tmp_path: Path, family: Family, cases: list[dict[str, Any]]
) -> None:
    if family != "qwen2":
        payload["model_path"] = str(make_tiny_model(tmp_path / "experts", family, vocab_size=101))
    results = run_distributed(2, "tests.workers.checkpoints:save_and_resume", payload | {"cases": cases})[0]
    for case, result in zip(cases, results, strict=True):
        same = "other_layout" not in case
        assert result["same_layout"] == same
        assert result["same_draw"] == same, case
        assert result["difference_loaded"] == 0.0, case
        if same or case["dtype"] == "float32":  # in bfloat16 layouts differ by a rounding
            assert result["difference_after"] <= (0.0 if same else 1e-5), (case, result)


def test_optimizer_parts_that_count_in_parameter_groups_share_their_step() -> None:
    class Part:  # of TransformerEngine's optimizer: no count in a group without parameters, or an old one
        def __init__(self) -> None:
            self.optimizer = object()

    class Optimizer:
        chained_optimizers = [Part(), Part()]
        param_groups: list[dict[str, Any]] = []

        def load_state_dict(self, state: dict[int, Any]) -> None:
            self.loaded = state

    optimizer = Optimizer()
    load_optimizer_state(
        optimizer,
        {0: {"param_groups": [{"step": 7}, {"step": 3}]}, 1: {"optimizer": {"param_groups": [{}]}}},
    )
    assert optimizer.loaded[0]["param_groups"] == [{"step": 7}, {"step": 7}]
    assert optimizer.loaded[1]["optimizer"]["param_groups"] == [{"step": 7}]


@pytest.mark.gpu
def test_a_resumed_actor_on_the_gpu_starts_from_the_state_of_the_save(payload: dict[str, Any]) -> None:
    cases = [{"layout": DP2, "dtype": "bfloat16", "updates_before": 1, "async_save": True, "decay": 0.8}]
    payload["cases"] = cases
    (result,) = run_distributed(1, "tests.workers.checkpoints:save_and_resume", payload, use_gpu=True)[0]
    assert result["same_draw"] and result["difference_loaded"] == 0.0


def test_what_is_written_in_the_background_is_the_state_of_the_save(payload: dict[str, Any]) -> None:
    layouts = {"whole": WHOLE, "distributed": DP2}
    results = run_distributed(
        2, "tests.workers.checkpoints:save_in_background", payload | {"layouts": layouts}
    )
    for outcome in results:
        for name in layouts:
            assert outcome[name] == (False, 0.0, 0.0), name


def test_a_run_that_a_checkpoint_does_not_belong_to_is_refused(
    payload: dict[str, Any], tmp_path: Path
) -> None:
    payload["moved_path"] = str(shutil.copytree(payload["model_path"], tmp_path / "moved"))
    every_rank = run_distributed(2, "tests.workers.checkpoints:refusals", payload)
    assert every_rank[0] == every_rank[1]
    found = every_rank[0]
    assert "model.dtype: 'float32' there, 'bfloat16' here" in found["dtype"]
    assert "parallel.distributed_optimizer: True there, False here" in found["optimizer"]
    assert "holds the states of ['data'], this run has ['data', 'rollout']" in found["parts"]
    assert "the model there has changed since the run began" in found["reference"]
    assert "has 3 completed steps, train.num_steps=2" in found["beyond"]
    assert found["accepted"] == found["moved"] == ""
    assert found["learning_rate"] == "0.001"


def test_what_the_length_of_the_schedule_follows_from_is_fixed_where_the_learning_rate_decays() -> None:
    def fixed(style: str, reference: str | None) -> set[str]:
        values = {
            "model": {"hf_path": "model"},
            "data": {"train_path": "unused"},
            "train": {"run_dir": "unused", "num_steps": 10},
            "optimizer": {"lr_decay_style": style},
        }
        return set(fixed_settings(RLConfig.model_validate(values), reference))

    length, place = {"train.num_steps", "train.num_mini_batches"}, {"model.hf_path", "model.megatron_path"}
    assert fixed("cosine", None) >= length | place
    assert not fixed("constant", "digest") & (length | place | {"optimizer.lr", "optimizer.min_lr"})


def refusal(saved: dict[str, Any], **objective: Any) -> str:
    """What a run with this objective says to a checkpoint with those settings; "" where it goes on."""
    values = {
        "model": {"hf_path": "model"},
        "data": {"train_path": "unused"},
        "train": {"run_dir": "unused", "num_steps": 10},
        "objective": objective,
    }
    settings = fixed_settings(RLConfig.model_validate(values), None)
    state = CheckpointState(1, 1, 0, {}, {}, None, {}, as_json(settings | saved), {}, {})
    for name in [name for name, value in saved.items() if value == "left out"]:
        state.settings.pop(name)
    try:
        check_resumable(state, Path("step"), settings, set(), None, max_step=10)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_setting_younger_than_the_checkpoint_had_its_default() -> None:
    young = {"objective.off_policy_mask": "left out", "objective.bapo": "left out"}
    assert refusal(young) == ""
    assert "off_policy_mask: None there, 0.5 here" in refusal(young, off_policy_mask=0.5)
    assert "bapo.target: 0.5 there, 0.25 here" in refusal(young, loss_mode="bapo", bapo={"target": 0.25})
    part = {"objective.bapo": {"low_start": 0.7}}  # all but one setting of the section are younger
    assert refusal(part, loss_mode="bapo", bapo={"low_start": 0.7}) == ""
    assert "(objective.bapo.low_start: 0.7 there, 0.8 here)" in refusal(part, loss_mode="bapo")


def test_what_no_method_reads_may_change() -> None:
    assert refusal({}, loss_mode="cispo", clip_high=0.4, bapo={"target": 0.25}) == ""
    assert refusal({"objective.clip_high": 0.28}, loss_mode="cispo", clip_high=0.4) == ""
    assert "clip_high: 0.28 there, 0.4 here" in refusal(
        {"objective.clip_high": 0.28}, loss_mode="vanilla", clip_high=0.4
    )


def test_a_setting_without_a_default_or_that_is_no_more_is_refused() -> None:
    assert "model.hf_path: no such setting there, 'model' here" in refusal({"model.hf_path": "left out"})
    for value in (0.5, None):
        found = refusal({"objective.former": value})
        assert f"objective.former: {value!r} there, no such setting here" in found
    assert "bapo.former: 1 there, no such setting here" in refusal({"objective.bapo": {"former": 1}})
