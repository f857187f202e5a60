"""Corrections that drop whole answers: against their definitions, alone and together, and what sees them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import (
    LossInputs,
    MetricSums,
    TokenMetric,
    build_objective,
    mismatch_metrics,
    mismatch_weights,
)
from apo_megatron.objectives.sequences import WholeSequences
from tests.objective_cases import ADVANTAGES, Case, config, inputs_of, make_case, token_weights
from tests.plain_sequence_losses import plain_weights

INF = math.inf
BAND = {"mismatch_correction": "seq_mask_tis", "seq_mask_low": 0.8, "seq_mask_high": 1.3}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "seq_mask_tis": BAND,
    "off_policy_mask": {"off_policy_mask": 0.3},
    "both": {**BAND, "off_policy_mask": 0.3},
    "with_tis": {"mismatch_correction": "tis", "tis_cap": 1.1, "off_policy_mask": 0.3},
}


def case_and_inputs(cfg: ObjectiveConfig, shift: tuple[float, ...] = (0.3, 0.0, 0.1, -0.1, 0.05)) -> Any:
    """Answers whose engine was ``shift`` nats a token off on average, apart from noise."""
    case = make_case(distance=0.1)
    noise = 0.1 * torch.randn(len(case.targets), generator=torch.Generator().manual_seed(4)).double()
    rollout = case.old_log_probs + torch.tensor(shift, dtype=torch.float64)[case.sequence_ids] + noise
    sequences = WholeSequences.all_here(case.sequence_ids)
    inputs = dataclasses.replace(inputs_of(case, cfg), rollout_log_probs=rollout, sequences=sequences)
    return case, inputs


def definition(case: Case, inputs: LossInputs, cfg: ObjectiveConfig) -> Tensor:
    weights = []
    for number in case.sequence_ids.unique():
        part = case.sequence_ids == number
        assert inputs.rollout_log_probs is not None
        weights += plain_weights(
            inputs.log_probs[part].tolist(),
            inputs.old_log_probs[part].tolist(),
            inputs.rollout_log_probs[part].tolist(),
            ADVANTAGES[number].item(),
            cfg.model_dump(),
        )
    return torch.tensor(weights, dtype=torch.float64)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mode", ["apo_ratio", "vanilla"])
@pytest.mark.parametrize("setting", ["plain", "kl"])
def test_the_policy_loss_is_weighted_and_nothing_else(correction: str, mode: str, setting: str) -> None:
    without = config(mode, setting)
    cfg = without.model_copy(update=CORRECTIONS[correction])
    case, inputs = case_and_inputs(cfg)
    weights = definition(case, inputs, cfg)
    assert (weights == 0).any() and (weights != 0).any()
    aggregation = token_weights(case, cfg)
    loss, metrics = build_objective(cfg)(inputs, aggregation)
    free = without.model_copy(update={"use_kl_loss": False})
    policy = build_objective(free)(inputs, aggregation * weights)[0]
    with_kl, without_kl = (build_objective(c)(inputs, aggregation)[0] for c in (without, free))
    expected = policy + with_kl - without_kl
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad(loss, case.logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, case.logits)[0], rtol=1e-10, atol=1e-12)


def test_the_mask_is_for_wrong_answers_that_have_become_unlikely() -> None:
    cfg = config("vanilla", "plain").model_copy(update={"off_policy_mask": 0.3, "support_telemetry": False})
    # Answers 0 and 3 are wrong, 2 is right; 0 and 2 were more likely when they were drawn, 3 was less.
    case, inputs = case_and_inputs(cfg, shift=(0.8, 0.0, 0.8, -0.8, 0.8))
    loss, metrics = build_objective(cfg)(inputs, token_weights(case, cfg))
    gradient = torch.autograd.grad(loss, case.logits)[0]
    has_none = [bool((gradient[case.sequence_ids == n] == 0).all()) for n in (0, 2, 3)]
    assert has_none == [True, False, False]
    sums = MetricSums()
    sums.add(metrics)
    found = sums.finalize()
    assert found["off_policy_masked_share"] == (case.sequence_ids == 0).double().mean()
    assert (
        "off_policy_masked_share"
        not in build_objective(config("vanilla", "plain"))(inputs, token_weights(case, cfg))[1]
    )


@pytest.mark.parametrize("correction", ["seq_mask_tis", "off_policy_mask", "both"])
def test_engines_that_agree_on_the_old_policy_change_nothing(correction: str) -> None:
    """To the bit, with the defaults of the band."""
    settings = {**CORRECTIONS[correction], "seq_mask_low": 0.999, "seq_mask_high": 1.002}
    results = []
    for update in ({}, settings):
        cfg = config("apo_ratio", "kl").model_copy(update=update)
        case = make_case()
        inputs = inputs_of(case, cfg)
        old = inputs.log_probs.detach()
        inputs = dataclasses.replace(
            inputs,
            old_log_probs=old,
            rollout_log_probs=old,
            sequences=WholeSequences.all_here(case.sequence_ids),
        )
        loss, _ = build_objective(cfg)(inputs, token_weights(case, cfg))
        results.append((loss.item(), torch.autograd.grad(loss, case.logits)[0]))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_the_bounds_of_the_band_belong_to_it_and_rho_is_the_tokens() -> None:
    rho = torch.tensor([0.5, 2.0, 4.0, 1.0, 3.0], dtype=torch.float64)  # geometric means 1, 2, 3
    ids = torch.tensor([0, 0, 1, 1, 2])
    for low, high, expected in (
        (1.0, 1.0, [0.5, 2.0, 0.0, 0.0, 0.0]),
        (0.9, 2.0 + 1e-12, [0.5, 2.0, 4.0, 1.0, 0.0]),
        (0.0, 3.0 + 1e-12, [0.5, 2.0, 4.0, 1.0, 3.0]),
    ):
        cfg = ObjectiveConfig(mismatch_correction="seq_mask_tis", seq_mask_low=low, seq_mask_high=high)
        sequences = WholeSequences.all_here(ids)
        found = mismatch_weights(rho.log(), torch.zeros(5, dtype=torch.float64), cfg, sequences)
        torch.testing.assert_close(found.tolist(), expected)
        share = mismatch_metrics(rho.log(), torch.zeros(5, dtype=torch.float64), cfg, sequences)
        is_changed = share["mismatch/corrected_share"].values
        assert is_changed.tolist() == [value == 0 for value in expected]


def test_what_the_engine_held_impossible_costs_its_answer_alone() -> None:
    cfg = config("vanilla", "plain").model_copy(update=CORRECTIONS["both"])
    case, inputs = case_and_inputs(cfg, shift=(0.0,) * 5)
    impossible = torch.arange(len(case.targets)) == 5  # a token of answer 2
    rollout = torch.where(impossible, -INF, inputs.rollout_log_probs)
    loss, metrics = build_objective(cfg)(
        dataclasses.replace(inputs, rollout_log_probs=rollout), token_weights(case, cfg)
    )
    gradient = torch.autograd.grad(loss, case.logits)[0]
    assert gradient.isfinite().all() and loss.isfinite()
    is_second = case.sequence_ids == 2
    assert (gradient[is_second] == 0).all() and (gradient[case.sequence_ids == 0] != 0).any()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_pull_acts_on_no_answer_that_was_dropped(correction: str) -> None:
    without = config("apo_ratio", "plain")
    cfg = without.model_copy(update=CORRECTIONS[correction])
    case, inputs = case_and_inputs(cfg)
    kept = definition(case, inputs, cfg) != 0
    pulled, free = (
        build_objective(c)(inputs, token_weights(case, cfg))[1]["pull_fraction"].values
        for c in (cfg, without)
    )
    assert torch.equal(pulled, free & kept) and (free & ~kept).any() and pulled.any()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_no_token_gives_the_same_metrics(correction: str) -> None:
    cfg = config("vanilla", "plain").model_copy(update=CORRECTIONS[correction])
    case, inputs = case_and_inputs(cfg)
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    nothing: dict[str, Any] = {name: v[:0] for name, v in fields.items() if isinstance(v, Tensor)}
    none = LossInputs(**nothing, sequences=WholeSequences.all_here(nothing["sequence_ids"]))
    loss, metrics = build_objective(cfg)(none, torch.zeros(0))
    assert loss.item() == 0 and loss.requires_grad
    some: dict[str, TokenMetric] = build_objective(cfg)(inputs, token_weights(case, cfg))[1]
    assert metrics.keys() == some.keys()


def test_needs_are_declared_by_what_is_set() -> None:
    def needs(**settings: Any) -> frozenset[str]:
        return build_objective(ObjectiveConfig(loss_mode="vanilla", **settings)).needs

    both = {"rollout_log_probs", "whole_sequences"}
    assert needs() == set() and needs(mismatch_correction="icepop") == {"rollout_log_probs"}
    assert needs(mismatch_correction="seq_mask_tis") == needs(off_policy_mask=0.5) == both
