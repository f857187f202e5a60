"""An actor that sleeps gives its training state's memory away, and trains on to the bit when it wakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny_models import Family, make_tiny_model

WHOLE = {"distributed_optimizer": False}
CASES: dict[str, dict[str, Any]] = {
    "dp2": {"layout": {}},
    "dp2_whole": {"layout": WHOLE},
    "dp2_bf16": {"layout": {}, "dtype": "bfloat16"},
    "dp2_bf16_whole": {"layout": WHOLE, "dtype": "bfloat16"},
    "pp2_vpp2": {"layout": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}},
    "experts": {"layout": {"expert_parallel_size": 2}, "dtype": "bfloat16", "family": "qwen3_moe"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both ranks saw, by case."""
    folder = tmp_path_factory.mktemp("offload")
    families: dict[Family, str] = {
        family: str(make_tiny_model(folder / family, family, num_layers=4))
        for family in ("qwen2", "qwen3_moe")
    }
    generator = torch.Generator().manual_seed(3)
    payload = {
        "folder": str(folder),
        "sequences": [torch.randint(2, 107, (n,), generator=generator) for n in (5, 9, 7, 12)],
        "cases": [{**case, "model_path": families[case.get("family", "qwen2")]} for case in CASES.values()],
    }
    by_rank = run_distributed(2, "tests.workers.offload:take_naps", payload)
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_naps_change_no_bit(case: str, results: dict[str, list[dict[str, Any]]]) -> None:
    for rank in results[case]:
        assert rank["same_after_naps"] and rank["same_at_the_end"] and rank["same_after_resume"]
        assert all(nap["same_state"] for nap in rank["naps"])


@pytest.mark.parametrize("case", CASES)
def test_the_memory_is_released_and_the_weights_stay(
    case: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in results[case]:
        for nap in rank["naps"]:
            assert nap["asleep"] == {"weights": nap["awake"]["weights"], "optimizer": 0, "gradients": 0}
            assert nap["after"] == nap["awake"] and nap["awake"]["gradients"] > 0
            assert nap["scores_work"] and nap["weights_are_there"]
        weights, optimizer = (rank["naps"][1]["awake"][name] for name in ("weights", "optimizer"))
        share = 1.0 if "whole" in case or "pp2" in case else 0.5  # of the state, that a rank has
        bytes_per_weight_byte = 6 if "bf16" in case else 2  # 12 bytes for 2, 8 bytes for 4
        if case != "experts":
            assert optimizer == pytest.approx(weights * bytes_per_weight_byte * share, rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_optimizer_state_is_away_while_gradients_are_computed(
    case: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in results[case]:
        assert rank["same_with_offload"]
        awake = rank["naps"][1]["awake"]
        assert len(rank["held_in_backward"]) == 3
        for held in rank["held_in_backward"]:
            assert held == {**awake, "optimizer": 0} and awake["optimizer"] > 0


@pytest.mark.parametrize("case", CASES)
def test_host_copies_are_reused(case: str, results: dict[str, list[dict[str, Any]]]) -> None:
    for rank in results[case]:
        _, second, third = (nap["host_copies"] for nap in rank["naps"])  # no moments before the first update
        assert second == third and len(second) > 0


def test_a_sleeping_actor_refuses_an_update(results: dict[str, list[dict[str, Any]]]) -> None:
    assert {rank["refusal"] for ranks in results.values() for rank in ranks} == {
        "the actor sleeps: call wake() first"
    }
