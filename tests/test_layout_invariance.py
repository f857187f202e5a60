"""Loss, gradient norm and parameters after two updates do not depend on the layout.

Every case is compared with ``plain_reference.py``: transformers, textbook formulas and torch AdamW.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apo_megatron.diagnosis.differences import relative_differences
from tests.distributed import run_distributed
from tests.plain_reference import run_plain
from tests.tiny_models import Family, make_tiny_model

RELATIVE_BOUND = 1e-5
VOCAB_SIZE, SEED, NUM_MINI_BATCHES = 107, 11, 2
OPTIMIZER = {"lr": 1e-3, "adam_eps": 1e-4, "weight_decay": 0.1, "clip_grad": 1.0}  # eps: see below

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp2_sp": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_size": 2},
    "pp2_vpp2": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2},
    "tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
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
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token-mean": {"loss_aggregation": "token-mean"},
    "seq-mean-token-mean": {"loss_aggregation": "seq-mean-token-mean"},
    "seq-mean-token-sum-norm": {
        "loss_aggregation": "seq-mean-token-sum-norm",
        "loss_aggregation_constant": 16,
    },
}
DEFAULTS = {"apo_topk": 8, "apo_push_coeff": 1.05, "apo_pull_coeff": 0.1, "clip_low": 0.2, "clip_high": 0.28}
MICRO_BATCH_SIZES = (1, 2, 5)  # 5: the last micro-batch of every mini-batch is ragged


def make_sequences() -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [
        {
            "tokens": rng.integers(0, VOCAB_SIZE, prompt + response).tolist(),
            "prompt_length": prompt,
            "advantage": float(advantage),
        }
        for prompt, response, advantage in zip(
            rng.integers(2, 9, 13).tolist(), rng.integers(1, 10, 13).tolist(), _advantages(rng), strict=True
        )
    ]


def _advantages(rng: np.random.Generator) -> np.ndarray:
    # Four wrong answers, nine right ones: a loss near 0 would have no meaningful relative difference.
    return np.where(np.arange(13) % 4 == 1, -1.0, 1.0) * rng.uniform(0.5, 1.5, 13)


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
                    "name": f"{world}:{name}:{loss}:{aggregation}",
                    "layout": {**LAYOUTS[name], "distributed_optimizer": number % 2 == 0},
                    "micro_batch_size": next(sizes),
                    "objective": {**DEFAULTS, **LOSSES[loss], **AGGREGATIONS[aggregation]},
                    "reference": f"{loss}:{aggregation}",
                }
            )
        if world == 2 and name in METHOD_LAYOUTS:
            layout = {**LAYOUTS[name], "distributed_optimizer": False}
            cases += [
                {**_case(name), "layout": layout, "micro_batch_size": next(sizes), **_method(method)}
                for method in (*METHODS, *APO_VARIANTS)
            ]
        next(sizes)  # shift, so that sizes and objectives meet in other pairs on the next layout
    if world == 2:
        cases += [_case("tp2_sp", recompute="full"), _case("pp2_vpp2", recompute="selective")]
    return cases


def _method(name: str) -> dict[str, Any]:
    objective = {**DEFAULTS, **(METHODS | APO_VARIANTS)[name], **AGGREGATIONS["token-mean"]}
    return {"objective": objective, "reference": name}


def _case(layout: str, **settings: Any) -> dict[str, Any]:
    return {
        "name": f"{layout}:{settings}",
        "layout": LAYOUTS[layout],
        "micro_batch_size": 2,
        "objective": {**DEFAULTS, **LOSSES["apo_ratio"], **AGGREGATIONS["token-mean"]},
        "reference": "apo_ratio:token-mean",
        **settings,
    }


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = make_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", num_layers=4)
    return {
        "model_path": str(path),
        "sequences": make_sequences(),
        "optimizer": OPTIMIZER,
        "num_mini_batches": NUM_MINI_BATCHES,
        "seed": SEED,
    }


@pytest.fixture(scope="module")
def expected(payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    objectives = {
        f"{loss}:{aggregation}": {**DEFAULTS, **LOSSES[loss], **AGGREGATIONS[aggregation]}
        for loss, aggregation in itertools.product(LOSSES, AGGREGATIONS)
    }
    objectives |= {name: _method(name)["objective"] for name in (*METHODS, *APO_VARIANTS)}
    return {
        reference: run_plain(
            payload["model_path"],
            payload["sequences"],
            {"kl_loss_coeff": 0.0, **objective},
            OPTIMIZER,
            NUM_MINI_BATCHES,
            SEED,
        )
        for reference, objective in objectives.items()
    }


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_update_equals_plain_torch_on_every_layout(
    world: int, payload: dict[str, Any], expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    cases = _cases(world)
    results = run_distributed(
        world, "tests.workers.layout_invariance:run_cases", {**payload, "cases": cases}
    )[0]
    worst = dict.fromkeys(("loss", "grad_norm", "parameters"), 0.0)
    failures = []
    for case, result in zip(cases, results, strict=True):
        differences = relative_differences(result, expected[case["reference"]])
        worst = {name: max(worst[name], value) for name, value in differences.items()}
        if max(differences.values()) > RELATIVE_BOUND:
            failures.append((case["name"], differences))
    print(f"{world} processes, {len(cases)} cases, largest relative differences: {worst}")
    assert not failures, failures


def test_bf16_update_is_close_to_fp32(payload: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    cases = [_case("tp2", dtype="bfloat16"), _case("pp2", dtype="bfloat16")]
    results = run_distributed(2, "tests.workers.layout_invariance:run_cases", {**payload, "cases": cases})[0]
    for result in results:
        differences = relative_differences(result, expected["apo_ratio:token-mean"])
        assert differences["loss"] < 0.1 and differences["grad_norm"] < 0.1
        assert differences["parameters"] < 0.01


def test_ranks_without_sequences_take_part(payload: dict[str, Any], tmp_path: Path) -> None:
    few = payload["sequences"][:3]  # mini-batches of two and one sequence for four ranks
    case = {**_case("one"), "micro_batch_size": 2}
    moe = str(make_tiny_model(tmp_path, "qwen3_moe"))
    packed = {**case, "max_tokens": 40, "max_logits_mib": 0}
    cases = [
        case,
        packed,
        {**packed, "layout": {"context_parallel_size": 2}},
        {**case, "layout": LAYOUTS["pp2"]},
        {**case, "layout": {"expert_parallel_size": 2}, "model_path": moe},
    ]
    found = run_distributed(
        4,
        "tests.workers.layout_invariance:run_cases",
        {**payload, "sequences": few, "cases": cases},
    )[0]
    dense, with_experts = (
        run_plain(path, few, case["objective"], OPTIMIZER, NUM_MINI_BATCHES, SEED)
        for path in (payload["model_path"], moe)
    )
    for result, expected in zip(found, (*[dense] * 4, with_experts), strict=True):
        assert max(relative_differences(result, expected).values()) < RELATIVE_BOUND


def test_tied_embeddings_are_updated_once(payload: dict[str, Any], tmp_path: Path) -> None:
    path = str(make_tiny_model(tmp_path, "qwen2_tied", num_layers=2))
    cases = [_case(layout) for layout in ("pp2", "tp2_sp", "tp2_pp2")]
    tied = {**payload, "model_path": path, "cases": cases}
    expected = run_plain(path, payload["sequences"], cases[0]["objective"], OPTIMIZER, NUM_MINI_BATCHES, SEED)
    for result in run_distributed(4, "tests.workers.layout_invariance:run_cases", tied)[0]:
        assert max(relative_differences(result, expected).values()) < RELATIVE_BOUND


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
def moe_expected(
    payload: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[Family, tuple[str, dict[str, Any]]]:
    """Family -> model path, and what plain torch makes of it."""
    objective = _case("one")["objective"]
    expected: dict[Family, tuple[str, dict[str, Any]]] = {}
    for family in dict.fromkeys(family for cases in MOE_CASES.values() for family, _ in cases):
        path = str(make_tiny_model(tmp_path_factory.mktemp(family), family))
        plain = run_plain(path, payload["sequences"], objective, OPTIMIZER, NUM_MINI_BATCHES, SEED)
        expected[family] = path, plain
    return expected


@pytest.mark.parametrize("world", sorted(MOE_CASES))
def test_experts_are_updated_as_by_plain_torch(
    world: int, payload: dict[str, Any], moe_expected: dict[Family, tuple[str, dict[str, Any]]]
) -> None:
    cases = [
        {**_case("one"), "layout": layout, "model_path": moe_expected[family][0]}
        for family, layout in MOE_CASES[world]
    ]
    results = run_distributed(
        world, "tests.workers.layout_invariance:run_cases", {**payload, "cases": cases}
    )[0]
    worst = dict.fromkeys(("loss", "grad_norm", "parameters"), 0.0)
    failures = []
    for (family, layout), result in zip(MOE_CASES[world], results, strict=True):
        differences = relative_differences(result, moe_expected[family][1])
        worst = {name: max(worst[name], value) for name, value in differences.items()}
        if max(differences.values()) > RELATIVE_BOUND:
            failures.append((family, layout, differences))
    print(f"{world} processes, {len(cases)} cases with experts, largest relative differences: {worst}")
    assert not failures, failures
