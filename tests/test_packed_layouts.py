"""Packed and padded, with logits and without, context parallel or not, overlapped or not: the same update.

One table of what is combined; each line is compared with ``plain_reference.py`` and printed.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_models import Family, make_tiny_model
from tests.update_cases import APO, LAYOUTS, Update, check_updates, make_sequences, plain_update

_CP2 = LAYOUTS["cp2"]
_EP2 = {"expert_parallel_size": 2}
_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_WHOLE = {"overlap_grad_reduce": True, "distributed_optimizer": False}
_PADDED: dict[str, Any] = {}
_PACKED = {"max_tokens": 40}  # of sequences with up to 16 tokens
_ALONE = {"max_tokens": 10}  # many are longer
_FUSED = {"max_logits_mib": 0}
_BUCKETS = {"bucket_size": 3000}  # parameters: several in these models

# Processes -> (family, layout, how micro-batches are made and projected). 13 sequences in two mini-batches.
TABLE: dict[int, list[tuple[Family, dict[str, Any], dict[str, Any]]]] = {
    1: [
        ("qwen2", {}, _PACKED),
        ("qwen2", {}, {**_PADDED, **_FUSED}),
        ("qwen2", {}, {**_PACKED, **_FUSED, "recompute": "full"}),
        ("qwen2", {}, _ALONE),
        ("deepseek_v3", {}, {**_PACKED, **_FUSED}),
    ],
    2: [
        ("qwen2", {}, {**_PACKED, **_FUSED}),  # DP2
        ("qwen2", _OVERLAP, {**_PADDED, **_BUCKETS}),
        ("qwen2", _WHOLE, {**_PACKED, **_FUSED, **_BUCKETS}),
        ("qwen2_tied", _OVERLAP, {**_PACKED, **_FUSED, **_BUCKETS}),
        ("qwen3_moe", _OVERLAP, {**_PACKED, **_BUCKETS}),
        ("qwen2", LAYOUTS["tp2"], {**_PADDED, **_FUSED}),
        ("qwen2", LAYOUTS["tp2_sp"], {**_PACKED, **_FUSED}),
        ("qwen2_tied", LAYOUTS["tp2_sp"], {**_PACKED, **_FUSED}),
        ("qwen2", LAYOUTS["pp2"], _PACKED),
        ("qwen2_tied", LAYOUTS["pp2"], {**_PACKED, **_FUSED}),
        ("qwen2", {**LAYOUTS["pp2_vpp2"], **_OVERLAP}, {**_PACKED, **_FUSED}),
        ("qwen2", _CP2, _PADDED),
        ("qwen2", _CP2, {**_PACKED, "recompute": "selective"}),
        ("qwen2_tied", _CP2, {**_PACKED, **_FUSED}),
        ("deepseek_v3", _CP2, {**_PACKED, **_FUSED}),
        ("qwen3_moe", _EP2, {**_PACKED, **_FUSED}),
        ("qwen3_moe", {**_CP2, **_EP2}, _PACKED),
    ],
    4: [
        ("qwen2", {**_CP2, **_OVERLAP}, {**_PACKED, **_FUSED, **_BUCKETS}),  # CP2 x DP2
        ("qwen2", {**LAYOUTS["pp2_vpp2"], **_OVERLAP}, {**_PACKED, **_FUSED, **_BUCKETS}),  # x DP2
        ("qwen2", {**_CP2, **LAYOUTS["tp2"]}, _PADDED),
        ("qwen2", {**_CP2, **LAYOUTS["tp2_sp"]}, {**_PACKED, **_FUSED, "recompute": "full"}),
        ("qwen2", {**_CP2, **LAYOUTS["pp2_vpp2"]}, {**_PACKED, **_FUSED}),
        ("qwen2", LAYOUTS["tp2_pp2"], {**_PACKED, **_FUSED}),
        ("deepseek_v3", {**_CP2, **_EP2, **LAYOUTS["tp2_sp"]}, {**_PACKED, **_FUSED}),
        ("qwen3_moe", {**_CP2, **_EP2, **LAYOUTS["pp2"]}, {**_PACKED, **_FUSED}),
    ],
}
_NUM_LAYERS = {"qwen2": 4}  # for virtual stages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, str]:
    families = dict.fromkeys(family for cases in TABLE.values() for family, _, _ in cases)
    return {
        family: str(
            make_tiny_model(tmp_path_factory.mktemp(family), family, num_layers=_NUM_LAYERS.get(family, 2))
        )
        for family in families
    }


@pytest.fixture(scope="module")
def expected(models: dict[Family, str]) -> dict[Family, Update]:
    return {family: plain_update(path, make_sequences(), APO) for family, path in models.items()}


@pytest.mark.parametrize("world", sorted(TABLE))
@pytest.mark.filterwarnings("ignore:sequences longer than")
def test_update_equals_plain_torch(
    world: int, models: dict[Family, str], expected: dict[Family, Update]
) -> None:
    cases = [
        {"model_path": models[family], "layout": layout, **how, "objective": APO}
        for family, layout, how in TABLE[world]
    ]
    check_updates(world, make_sequences(), cases, [expected[family] for family, _, _ in TABLE[world]])
