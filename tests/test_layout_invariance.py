"""Loss, gradient norm and parameters after two updates do not depend on the layout.

Every case is compared with ``plain_reference.py``: transformers, textbook formulas and torch AdamW.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.diagnosis.differences import relative_differences
from tests.tiny_models import Family, make_tiny_model
from tests.update_cases import (
    AGGREGATIONS,
    APO,
    DEFAULTS,
    LAYOUTS,
    Update,
    check_updates,
    make_sequences,
    plain_update,
    updates,
)

# Processes -> layouts; what the layout leaves of the processes is data parallel.
WORLDS = {
    1: ["one"],
    2: ["one", "tp2", "tp2_sp", "pp2", "pp2_vpp2"],  # "one" on 2 processes is DP2
    4: ["tp2", "tp2_sp", "pp2", "pp2_vpp2", "tp2_pp2"],  # tp2 on 4 processes is TP2 x DP2
}
LOSSES: dict[str, dict[str, Any]] = {
    "apo_ratio": {"loss_mode": "apo_ratio", "apo_pull_coeff": 0.15},
    "vanilla": {"loss_mode": "vanilla"},
    "kl": {"loss_mode": "vanilla", "use_kl_loss": True, "kl_loss_coeff": 0.5},
    "kl_on_wrong": {"loss_mode": "vanilla", "use_kl_loss_on_wrong": True, "kl_loss_coeff": 0.5},
}
# The other losses, bounded so closely that the second update reaches the bounds. On two processes only.
METHODS: dict[str, dict[str, Any]] = {
    name: {"loss_mode": name, "clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.05, **settings}
    for name, settings in {
        "cispo": {"cispo": {"clip_low": 0.01, "clip_high": 0.01}},
        "dispo": {
            "dispo": {
                "right_clip_low": 0.01,
                "right_clip_high": 0.02,
                "wrong_clip_low": 0.02,
                "wrong_clip_high": 0.01,
            }
        },
        "sapo": {"sapo": {"right_temperature": 8.0, "wrong_temperature": 9.0}},
        "gppo": {"gppo": {"right_gradient": 0.5, "wrong_gradient": 0.75}},
        "dcpo_clip": {"dcpo": {"clip_low": 1e-4, "clip_high": 1e-4, "max_ratio": 1.5}},
        "dppo_tv": {"dppo": {"max_increase": 1e-4, "max_decrease": 1e-4, "max_weight": 1.01}},
    }.items()
}
APO_VARIANTS: dict[str, dict[str, Any]] = {
    f"apo_ratio:{name}": {**LOSSES["apo_ratio"], "apo_variants": {name: value}}
    for name, value in (("detach_pull", True), ("support_mass", 0.05))
}
METHOD_LAYOUTS = ("one", "tp2", "pp2")
MICRO_BATCH_SIZES = (1, 2, 5)  # 5: the last micro-batch of every mini-batch is ragged


def _cases(world: int) -> list[dict[str, Any]]:
    sizes = itertools.cycle(MICRO_BATCH_SIZES)
    cases = []
    for name in WORLDS[world]:
        # First those with the distributed optimizer, then those without: each change of layout makes new
        # process groups, whose threads stay.
        # Every second pair of the two on several processes, all of them on one.
        pairs = list(itertools.product(LOSSES, AGGREGATIONS))
        pairs = pairs if world == 1 else [pair for i, pair in enumerate(pairs) if (i // 3 + i % 3) % 2 == 0]
        for number, (loss, aggregation) in sorted(enumerate(pairs), key=lambda item: item[0] % 2):
            cases.append(
                {
                    "layout": {**LAYOUTS[name], "distributed_optimizer": number % 2 == 0},
                    "micro_batch_size": next(sizes),
                    "reference": f"{loss}:{aggregation}",
                }
            )
        if world == 2 and name in METHOD_LAYOUTS:
            layout = {**LAYOUTS[name], "distributed_optimizer": False}
            cases += [
                {"layout": layout, "micro_batch_size": next(sizes), "reference": method}
                for method in (*METHODS, *APO_VARIANTS)
            ]
        next(sizes)  # shift, so that sizes and objectives meet in other pairs on the next layout
    if world == 2:
        cases += [
            {"layout": LAYOUTS["tp2_sp"], "recompute": "full", "reference": "apo_ratio:token-mean"},
            {"layout": LAYOUTS["pp2_vpp2"], "recompute": "selective", "reference": "apo_ratio:token-mean"},
        ]
    return cases


OBJECTIVES = {
    f"{loss}:{aggregation}": {**DEFAULTS, **LOSSES[loss], **AGGREGATIONS[aggregation]}
    for loss, aggregation in itertools.product(LOSSES, AGGREGATIONS)
} | {
    name: {**DEFAULTS, **method, **AGGREGATIONS["token-mean"]}
    for name, method in (METHODS | APO_VARIANTS).items()
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", num_layers=4)


@pytest.fixture(scope="module")
def expected(model_path: Path) -> dict[str, Update]:
    sequences = make_sequences()
    return {name: plain_update(model_path, sequences, objective) for name, objective in OBJECTIVES.items()}


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_update_equals_plain_torch_on_every_layout(
    world: int, model_path: Path, expected: dict[str, Update]
) -> None:
    cases = _cases(world)
    prepared = [
        {**case, "model_path": model_path, "objective": OBJECTIVES[case["reference"]]} for case in cases
    ]
    check_updates(world, make_sequences(), prepared, [expected[case["reference"]] for case in cases])


def test_bf16_update_is_close_to_fp32(model_path: Path, expected: dict[str, Update]) -> None:
    cases = [
        {"model_path": model_path, "layout": LAYOUTS[layout], "objective": APO, "dtype": "bfloat16"}
        for layout in ("tp2", "pp2")
    ]
    for result in updates(2, make_sequences(), cases):
        differences = relative_differences(result, expected["apo_ratio:token-mean"])
        assert differences["loss"] < 0.1 and differences["grad_norm"] < 0.1
        assert differences["parameters"] < 0.01


def test_ranks_without_sequences_take_part(model_path: Path, tmp_path: Path) -> None:
    few = make_sequences()[:3]  # mini-batches of two and one sequence for four ranks
    case: dict[str, Any] = {"model_path": model_path, "layout": {}, "objective": APO}
    packed = {**case, "max_tokens": 40, "max_logits_mib": 0}
    with_experts = {**case, "model_path": make_tiny_model(tmp_path, "qwen3_moe")}
    cases = [
        case,
        packed,
        {**packed, "layout": LAYOUTS["cp2"]},
        {**case, "layout": LAYOUTS["pp2"]},
        {**with_experts, "layout": {"expert_parallel_size": 2}},
    ]
    plain = {path: plain_update(path, few, APO) for path in (model_path, with_experts["model_path"])}
    check_updates(4, few, cases, [plain[case["model_path"]] for case in cases])


def test_tied_embeddings_are_updated_once(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen2_tied", num_layers=2)
    cases = [
        {"model_path": path, "layout": LAYOUTS[layout], "objective": APO}
        for layout in ("pp2", "tp2_sp", "tp2_pp2")
    ]
    check_updates(4, make_sequences(), cases, [plain_update(path, make_sequences(), APO)] * len(cases))


_EP2 = {"expert_parallel_size": 2}
_ETP2 = {"expert_tensor_parallel_size": 2}
# Processes -> (family, layout).
MOE_CASES: dict[int, list[tuple[Family, dict[str, Any]]]] = {
    2: [
        ("qwen3_moe", {}),  # DP2
        ("qwen3_moe", _EP2),
        ("deepseek_v3", _EP2),
        ("qwen3_moe", {**_EP2, "distributed_optimizer": False}),
        ("qwen3_moe_mixed", LAYOUTS["pp2"]),  # the first stage has no experts
        ("qwen3_moe", LAYOUTS["tp2_sp"]),  # each rank has all experts, and half of their tokens
        ("qwen3_moe", {**LAYOUTS["tp2_sp"], **_ETP2}),
        ("qwen3_moe", {**LAYOUTS["tp2_sp"], **_EP2}),
    ],
    4: [
        ("qwen3_moe", _EP2),  # DP4: each expert on two ranks
        ("qwen3_moe", {**LAYOUTS["tp2_sp"], **_EP2}),
        ("deepseek_v3", {**LAYOUTS["tp2_sp"], **_EP2}),
        ("qwen3_moe", {**LAYOUTS["tp2_sp"], **_EP2, **_ETP2}),
        ("qwen3_moe", {**LAYOUTS["tp2_sp"], "distributed_optimizer": False}),
        ("qwen3_moe", {**LAYOUTS["pp2"], **_EP2}),
    ],
}


@pytest.fixture(scope="module")
def moe_expected(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, tuple[Path, Update]]:
    """Family -> model path, and what plain torch makes of it."""
    expected: dict[Family, tuple[Path, Update]] = {}
    for family in dict.fromkeys(family for cases in MOE_CASES.values() for family, _ in cases):
        path = make_tiny_model(tmp_path_factory.mktemp(family), family)
        expected[family] = path, plain_update(path, make_sequences(), APO)
    return expected


@pytest.mark.parametrize("world", sorted(MOE_CASES))
def test_experts_are_updated_as_by_plain_torch(
    world: int, moe_expected: dict[Family, tuple[Path, Update]]
) -> None:
    cases = [
        {"model_path": moe_expected[family][0], "layout": layout, "objective": APO}
        for family, layout in MOE_CASES[world]
    ]
    check_updates(world, make_sequences(), cases, [moe_expected[family][1] for family, _ in MOE_CASES[world]])
