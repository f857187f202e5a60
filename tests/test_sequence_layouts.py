"""Whole answers on every layout: cut by context parallelism, packed, in other micro-batches: one update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import run_distributed
from tests.plain_sequence_losses import plain_weights
from tests.tiny_models import make_tiny_model
from tests.update_cases import (
    AGGREGATIONS,
    DEFAULTS,
    LAYOUTS,
    check_updates,
    make_sequences,
    plain_update,
)

# Bounds that the second update reaches.
OBJECTIVES: dict[str, dict[str, Any]] = {
    name: {**DEFAULTS, **AGGREGATIONS["token-mean"], "dual_clip": None, "loss_mode": name, **settings}
    for name, settings in {
        "gspo": {"gspo": {"clip_low": 0.004, "clip_high": 0.004}, **AGGREGATIONS["seq-mean-token-mean"]},
        "ctpo": {"ctpo": {"low": 0.01, "high": 0.01, "dual": 0.02, "power": 0.5, "geometric_mean": False}},
        "vespo": {
            "vespo": {"right_power": 2.0, "right_decay": 3.0, "wrong_power": 3.0, "wrong_decay": 2.0},
        },
    }.items()
}
OBJECTIVES["seq_mask_tis"] = {
    **DEFAULTS,
    **AGGREGATIONS["token-mean"],
    "loss_mode": "vanilla",
    "mismatch_correction": "seq_mask_tis",
    "seq_mask_low": 0.8,
    "seq_mask_high": 1.25,
}
OBJECTIVES["off_policy_mask"] = {
    **DEFAULTS,
    **AGGREGATIONS["token-mean"],
    "loss_mode": "apo_ratio",
    "mismatch_correction": "tis",
    "tis_cap": 1.1,
    "off_policy_mask": 0.1,
}
_CP2 = LAYOUTS["cp2"]
_PACKED = {"max_tokens": 40}  # of answers with up to 9 tokens after 2 to 8
_FUSED = {"max_logits_mib": 0}
# Processes -> (layout, how micro-batches are made and projected).
TABLE: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    2: [
        ({}, {"micro_batch_size": 1}),  # DP2
        (LAYOUTS["tp2_sp"], {**_PACKED, **_FUSED}),
        (LAYOUTS["pp2"], {"micro_batch_size": 5}),
        (_CP2, {"micro_batch_size": 3}),
        (_CP2, {**_PACKED, **_FUSED}),
    ],
    4: [(_CP2, _PACKED), ({**_CP2, **LAYOUTS["pp2"]}, _PACKED)],
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("sequences"), "qwen2", num_layers=2))


@pytest.fixture(scope="module")
def sequences(model_path: str) -> list[dict[str, Any]]:
    """With the log-probs of an engine that is off by up to 0.4 nats a token, answer by answer."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    found = make_sequences()
    for number, sequence in enumerate(found):
        start, tokens = sequence["prompt_length"], torch.tensor(sequence["tokens"])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, start - 1 : -1]
        old = logits.log_softmax(-1).gather(-1, tokens[start:, None])[:, 0]
        if sequence["advantage"] < 0:  # a loss near 0 would have no meaningful relative difference
            sequence["advantage"] *= 0.25
        shift = (0.0, 0.4, 0.1, -0.4, 0.05, 0.3, 0.2, 0.0, -0.1, -0.1, -0.4, 0.4, 0.0)[number]
        noise = 0.05 * torch.randn(len(old), generator=generator)
        sequence["old"], sequence["rollout"] = old.tolist(), (old + shift + noise).tolist()
    return found


@pytest.mark.parametrize("world", sorted(TABLE))
@pytest.mark.filterwarnings("ignore:sequences longer than")
def test_update_equals_plain_torch(world: int, model_path: str, sequences: list[dict[str, Any]]) -> None:
    # On 4 processes 3 answers in 2 mini-batches: ranks that have nothing but padding take part.
    chosen = sequences if world == 2 else [sequences[i] for i in (2, 5, 4)]
    cases = [
        {"model_path": model_path, "layout": layout, **how, "objective": objective}
        for layout, how in TABLE[world]
        for objective in OBJECTIVES.values()
    ]
    expected = [plain_update(model_path, chosen, objective) for objective in OBJECTIVES.values()]
    check_updates(world, chosen, cases, expected * len(TABLE[world]))


def test_shares_of_dropped_answers_do_not_depend_on_the_layout(
    model_path: str, sequences: list[dict[str, Any]]
) -> None:
    names = ("seq_mask_tis", "off_policy_mask")
    payload = {
        "model_path": model_path,
        "temperature": 1.0,
        "sequences": [
            {**s, "tokens": torch.tensor(s["tokens"]), "rollout": torch.tensor(s["rollout"])}
            for s in sequences
        ],
        "layouts": {"dp2": {}, "cp2": _CP2},
        "objectives": {name: OBJECTIVES[name] for name in names},
    }
    by_rank = run_distributed(2, "tests.workers.mismatch:run_layouts", payload)
    weights = {
        name: [
            weight
            for s in sequences
            for weight in plain_weights(s["old"], s["old"], s["rollout"], s["advantage"], OBJECTIVES[name])
        ]
        for name in names
    }
    dropped = {name: sum(w == 0 for w in values) / len(values) for name, values in weights.items()}
    assert all(0.05 < share < 0.95 for share in dropped.values()), dropped
    for layout in ("dp2", "cp2"):
        assert by_rank[0][layout]["updates"] == by_rank[1][layout]["updates"]
        masked, off_policy = (by_rank[0][layout]["updates"][name] for name in names)
        assert masked["mismatch/corrected_share"] == pytest.approx(dropped["seq_mask_tis"])
        assert off_policy["off_policy_masked_share"] == pytest.approx(dropped["off_policy_mask"])
        assert 0 < off_policy["pull_fraction"] < 1


def test_the_objectives_differ(model_path: str, sequences: list[dict[str, Any]]) -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    without = {**OBJECTIVES["seq_mask_tis"], "mismatch_correction": "none"}
    wide = {"gspo": {"clip_low": 0.9, "clip_high": 9.0}}
    far = {"ctpo": {**OBJECTIVES["ctpo"]["ctpo"], "low": 9.0, "high": 9.0, "dual": 9.0}}
    flat = {"vespo": {f"{s}_{k}": 1e-9 for s in ("right", "wrong") for k in ("power", "decay")}}
    pairs = (
        (OBJECTIVES["gspo"], {**OBJECTIVES["gspo"], **wide}),
        (OBJECTIVES["ctpo"], {**OBJECTIVES["ctpo"], **far}),
        (OBJECTIVES["vespo"], {**OBJECTIVES["vespo"], **flat}),
        (OBJECTIVES["seq_mask_tis"], without),
        (OBJECTIVES["off_policy_mask"], {**OBJECTIVES["off_policy_mask"], "off_policy_mask": None}),
    )
    for one, other in pairs:
        norms = [
            plain_update(model_path, sequences, objective)["grad_norms"][1] for objective in (one, other)
        ]
        assert abs(norms[0] - norms[1]) > 1e-3 * norms[1], (one, norms)
