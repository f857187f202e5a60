"""Losses that look at the whole mini-batch give one update on every layout: that of ``plain_reference.py``.

The log-probs of the old policy are given, some way off, so that every ratio, bound and draw acts in both
updates. Groups lie on several ranks and in several micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from apo_megatron.config import ObjectiveConfig
from apo_megatron.config.policy_losses import PolicyLossName
from apo_megatron.data.collate import Batch, TrainingSequence, make_batch
from apo_megatron.parallel.state import ParallelContext
from tests.distributed import run_distributed
from tests.tiny_models import make_tiny_model
from tests.update_cases import (
    BOUNDS,
    LAYOUTS,
    NUM_MINI_BATCHES,
    Update,
    check_updates,
    make_sequences,
    payload_of,
    plain_update,
)

WIDER_BOUNDS = {**BOUNDS, "loss": 5e-5}  # some losses lie near 0
LOSSES: dict[str, dict[str, Any]] = {
    "clip_cov": {
        "clip_cov": {
            "share": 0.2,
            "covariance_low": 0.2,
            "covariance_high": 3.0,
            "clip_low": 0.2,
            "clip_high": 0.2,
        },
        "loss_aggregation": "seq-mean-token-mean",
    },
    "kl_cov": {"kl_cov": {"share": 0.3, "coeff": 0.5}},
    "bapo": {"bapo": {"target": 1.25, "low_start": 0.7, "low_max": 0.75, "high_start": 1.05}},
    "p3o": {"loss_aggregation": "seq-mean-token-mean"},
    "dmpo": {"dmpo": {"coeff": 20.0, "temperature": 0.5}, "loss_aggregation": "seq-mean-token-mean"},
}
_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_PACKED = {"max_tokens": 40}
# Processes -> (layout, how micro-batches are made); one line after the other, with every loss.
TABLE: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    1: [({}, {"micro_batch_size": 1}), ({}, _PACKED)],
    2: [
        (_OVERLAP, {"micro_batch_size": 5, "bucket_size": 3000}),  # DP2
        (LAYOUTS["tp2"], {"micro_batch_size": 2}),
        (LAYOUTS["pp2"], _PACKED),
        (LAYOUTS["pp2_vpp2"], {"micro_batch_size": 2}),
        (LAYOUTS["cp2"], {"micro_batch_size": 2}),
        (LAYOUTS["cp2"], _PACKED),
    ],
}


def with_old_policy(model_path: Path) -> list[dict[str, Any]]:
    """The sequences of the other layout tests, with an old policy and five groups."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rng = np.random.default_rng(7)
    sequences = []
    for number, sequence in enumerate(make_sequences()):
        tokens, start = torch.tensor(sequence["tokens"]), sequence["prompt_length"]
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
        current = log_probs.gather(-1, tokens[start:, None])[:, 0].numpy()
        moved = current + rng.normal(0, 0.3, len(current)).astype(np.float32)
        more = {"rollout": moved.tolist(), "group": number % 5}
        sequences.append({**sequence, **more})
    return sequences


def objective_of(name: str) -> dict[str, Any]:
    return {"loss_mode": name, "old_log_probs": "rollout", "support_telemetry": False, **LOSSES[name]}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen2", num_layers=4)


@pytest.fixture(scope="module")
def sequences(model_path: Path) -> list[dict[str, Any]]:
    return with_old_policy(model_path)


def plain(model_path: Path, sequences: list[dict[str, Any]]) -> dict[str, Update]:
    """By loss."""
    objectives = {name: ObjectiveConfig(**objective_of(name)).model_dump() for name in LOSSES}
    return {name: plain_update(model_path, sequences, objective) for name, objective in objectives.items()}


@pytest.fixture(scope="module")
def expected(model_path: Path, sequences: list[dict[str, Any]]) -> dict[str, Update]:
    return plain(model_path, sequences)


@pytest.mark.parametrize("world", sorted(TABLE))
def test_update_equals_plain_torch_on_every_layout(
    world: int, model_path: Path, sequences: list[dict[str, Any]], expected: dict[str, Update]
) -> None:
    cases = [
        {"model_path": model_path, "layout": layout, **how, "objective": objective_of(name)}
        for layout, how in TABLE[world]
        for name in LOSSES
    ]
    check_updates(world, sequences, cases, [*expected.values()] * len(TABLE[world]), WIDER_BOUNDS)


def test_ranks_without_sequences_take_part(model_path: Path, sequences: list[dict[str, Any]]) -> None:
    few = [sequences[i] for i in (0, 5, 1)]  # of two groups: mini-batches of two and one
    cases = [
        {"model_path": model_path, "layout": {}, **_PACKED, "objective": objective_of(name)}
        for name in LOSSES
    ]
    check_updates(2, few, cases, [*plain(model_path, few).values()], WIDER_BOUNDS)


def test_the_first_update_after_the_old_pass_needs_no_pass_of_its_own(
    model_path: Path, sequences: list[dict[str, Any]]
) -> None:
    """Its weights are the old ones. Without an old pass every update needs one."""
    cases = [
        {"model_path": model_path, "layout": {}, "objective": {**objective_of("p3o"), "old_log_probs": mode}}
        for mode in ("recompute", "rollout")
    ]
    worker = "tests.workers.layout_invariance:count_passes"
    counts = run_distributed(1, worker, payload_of(sequences, cases))[0]
    assert counts == [1 + NUM_MINI_BATCHES - 1, NUM_MINI_BATCHES]


# --- what make_batch prepares -----------------------------------------------------------------------


def shares(loss_mode: PolicyLossName, num_ranks: int, seed: tuple[int, int] = (3, 5)) -> list[Batch]:
    """The batch of each data rank: 7 prompts with 1 to 4 answers, in 3 mini-batches."""
    sequences = [
        TrainingSequence(
            np.arange(3 + group % 4 + i),
            2,
            1.0,
            np.zeros(1 + group % 4 + i),
            group=group,
        )
        for group in range(7)
        for i in range(1 + group % 4)
    ]
    places = (SimpleNamespace(dims=SimpleNamespace(data=num_ranks), data_rank=r) for r in range(num_ranks))
    cfg = ObjectiveConfig(loss_mode=loss_mode)
    return [make_batch(sequences, cfg, cast(ParallelContext, place), 3, seed) for place in places]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_loss_of_groups_finds_each_whole_in_one_mini_batch(num_ranks: int) -> None:
    def groups_of(loss_mode: PolicyLossName) -> list[list[int]]:
        batches = [batch.mini_batches() for batch in shares(loss_mode, num_ranks)]
        return [
            sorted(group for part in parts if part.groups is not None for group in part.groups.tolist())
            for parts in zip(*batches, strict=True)
        ]

    found = groups_of("dmpo")
    assert sorted(sum(found, [])) == [g for g in range(7) for _ in range(1 + g % 4)]
    assert all(part.count(g) == 1 + g % 4 for part in found for g in part) and all(found)
    assert any(part.count(g) != 1 + g % 4 for part in groups_of("vanilla") for g in part)


def test_what_is_drawn_hangs_on_the_sequence_and_the_step_alone() -> None:
    def seeds(num_ranks: int, seed: tuple[int, int] = (3, 5)) -> dict[int, int]:
        found: dict[int, int] = {}
        for batch in shares("clip_cov", num_ranks, seed):
            assert batch.sequences.draw_seeds is not None
            found |= dict(zip(batch.rows, batch.sequences.draw_seeds.tolist(), strict=True))
        return found

    assert seeds(1) == seeds(2) == seeds(3) and len(set(seeds(1).values())) == 16
    assert not set(seeds(1).values()) & set(seeds(1, (3, 6)).values())
    assert not set(seeds(1).values()) & set(seeds(1, (4, 5)).values())
