"""Losses over whole answers: in float64 against their definitions, and what they have in common."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.objectives import POLICY_LOSSES, LossInputs, build_objective
from apo_megatron.objectives.sequences import (
    WholeSequences,
    position_in_sequence,
    prefix_sum,
    sequence_mean,
    sequence_sum,
)
from tests.objective_cases import shares
from tests.plain_sequence_losses import PLAIN_SEQUENCE_LOSSES, plain_sequence_loss
from tests.test_policy_losses import config_of, evaluate

NAMES = tuple(PLAIN_SEQUENCE_LOSSES)
LENGTHS = (1, 7, 30, 2, 1, 64, 5, 16, 3, 3, 11, 40)
# Every bound is reached by the answers below.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "own": {
        "dual_clip": 1.29,
        "gspo": {"clip_low": 0.02, "clip_high": 0.03},
        "ctpo": {"low": 0.2, "high": 0.1, "dual": 0.4, "power": 0.3},
        "vespo": {"right_power": 1.5, "right_decay": 1.0, "wrong_power": 0.5, "wrong_decay": 2.5},
    },
    "geometric_mean": {"ctpo": {"power": -0.5, "geometric_mean": True}},
}


def answers(distance: float, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> LossInputs:
    """Right, wrong and neutral answers, their tokens ``distance`` from the old policy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    old = -torch.empty(len(ids), dtype=torch.float64).exponential_(0.5, generator=generator)
    moved = old + distance * torch.randn(len(ids), generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    advantages[9:10] = 0.0
    return inputs_of(moved, old, advantages[ids], ids)


def inputs_of(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, ids: Tensor) -> LossInputs:
    return LossInputs(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=old_log_probs,
        advantages=advantages,
        entropy=torch.zeros_like(old_log_probs),
        sequence_ids=ids,
        sequences=WholeSequences.all_here(ids),
    )


def plain(name: str, inputs: LossInputs, settings: dict[str, Any]) -> Tensor:
    """The definition, answer by answer."""
    values = config_of(name, settings).model_dump()
    losses = []
    for number in inputs.sequence_ids.unique_consecutive():
        part = inputs.sequence_ids == number
        logs, advantage = (inputs.log_probs[part], inputs.old_log_probs[part]), inputs.advantages[part][0]
        losses.append(plain_sequence_loss(name, *logs, advantage.item(), values))
    return torch.cat(losses)


# --- the sums -------------------------------------------------------------------------------------


def test_sums_are_those_of_a_loop() -> None:
    ids = torch.tensor([4, 4, 4, 0, 9, 9])
    values = torch.tensor([1.0, -2.0, 4.0, 7.0, 0.5, 3.0], requires_grad=True)
    sequences = WholeSequences.all_here(ids)
    assert sequence_sum(values, sequences).tolist() == [3.0, 3.0, 3.0, 7.0, 3.5, 3.5]
    assert sequence_mean(values, sequences).tolist() == [1.0, 1.0, 1.0, 7.0, 1.75, 1.75]
    assert prefix_sum(values, sequences).tolist() == [1.0, -1.0, 3.0, 7.0, 0.5, 3.5]
    assert position_in_sequence(values, sequences).tolist() == [1.0, 2.0, 3.0, 1.0, 1.0, 2.0]
    for function in (sequence_sum, sequence_mean, prefix_sum, position_in_sequence):
        found = function(values, sequences)
        assert found.dtype == values.dtype and not found.requires_grad
        nothing = WholeSequences.all_here(ids[:0])
        assert function(values[:0], nothing).shape == (0,)


def test_sums_of_tokens_that_other_ranks_have() -> None:
    """This rank has tokens 0, 3 and 5 of two answers, and nothing of the third."""
    ids, values = torch.tensor([2, 2, 2, 5, 5, 5, 7]), torch.arange(7.0)
    places = torch.tensor([0, 3, 5])
    sequences = WholeSequences(ids, lambda here: values, lambda everywhere: everywhere[places])
    assert sequence_sum(values[places], sequences).tolist() == [3.0, 12.0, 12.0]
    assert sequence_mean(values[places], sequences).tolist() == [1.0, 4.0, 4.0]
    assert prefix_sum(values[places], sequences).tolist() == [0.0, 3.0, 12.0]
    assert position_in_sequence(values[places], sequences).tolist() == [1.0, 1.0, 3.0]


def test_what_else_is_in_the_micro_batch_does_not_matter_in_fp32() -> None:
    small = torch.tensor([1e-4, 2e-4])
    ids = torch.repeat_interleave(torch.arange(2), torch.tensor([5000, 2]))
    values = torch.cat([torch.full((5000,), 20.0), small])
    for function in (sequence_sum, sequence_mean, prefix_sum):
        alone = function(small, WholeSequences.all_here(ids[-2:]))
        found = function(values, WholeSequences.all_here(ids))[-2:]
        torch.testing.assert_close(found, alone, rtol=2e-7, atol=0)


# --- each against its definition ------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.0, 0.01, 0.2, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(name: str, distance: float, setting: str) -> None:
    inputs = answers(distance)
    found, slopes, _ = evaluate(name, inputs, **SETTINGS[setting])
    expected = plain(name, inputs, SETTINGS[setting])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-14)
    expected_slopes = torch.autograd.grad(expected.sum(), inputs.log_probs)[0]
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["gspo", "ctpo"])
def test_the_answers_reach_every_bound(name: str) -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    bounds = ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction")
    for distance, setting in ((0.2, "own"), (3.0, "own")):
        found = shares(evaluate(name, answers(distance), **SETTINGS[setting])[2])
        reached = bounds[:2] if name == "gspo" and distance == 0.2 else bounds
        assert all(0.0 < found[bound] < 0.8 for bound in reached), found
    assert 0.05 < shares(evaluate("vespo", answers(0.2))[2])["sequence_weight"] < 0.95


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NAMES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(name: str, setting: str) -> None:
    inputs = answers(0.0)
    _, slopes, outputs = evaluate(name, inputs, **SETTINGS[setting])
    torch.testing.assert_close(slopes, -inputs.advantages, rtol=1e-13, atol=0)
    found = shares(outputs)
    assert not any(value for key, value in found.items() if "fraction" in key)
    assert found.get("sequence_weight", 1.0) == 1.0


# --- what they have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_probabilities_stay_finite(name: str, dtype: torch.dtype, setting: str) -> None:
    logs = torch.tensor([0.0, -1e-7, -19.0, -21.0, -1000.0], dtype=dtype)
    log_probs, old = torch.cartesian_prod(logs, logs).repeat_interleave(3, dim=0).unbind(1)
    for sign in (-2.0, 0.0, 2.0):
        for ids in (torch.arange(75), torch.arange(75) // 3, torch.zeros(75, dtype=torch.int64)):
            inputs = inputs_of(log_probs.clone(), old, torch.full_like(old, sign), ids)
            found, slopes, outputs = evaluate(name, inputs, **SETTINGS[setting])
            assert found.isfinite().all() and slopes.isfinite().all() and found.dtype == dtype
            assert sign != 0 or ((found == 0).all() and (slopes == 0).all())
            assert all(math.isfinite(value) for value in shares(outputs).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_token_has_no_loss_and_the_same_metrics(name: str) -> None:
    found, slopes, outputs = evaluate(name, answers(0.2, lengths=()), dual_clip=3.0)
    assert found.shape == slopes.shape == (0,)
    assert evaluate(name, answers(0.2), dual_clip=3.0)[2].metrics.keys() == outputs.metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_does_not_see_the_others(name: str) -> None:
    whole = answers(0.01)
    found, slopes, _ = evaluate(name, whole)
    for number in (0, 2, 5, 11):
        part = whole.sequence_ids == number
        logs = whole.log_probs[part].detach(), whole.old_log_probs[part]
        alone = evaluate(name, inputs_of(*logs, whole.advantages[part], whole.sequence_ids[part]))
        torch.testing.assert_close(alone[0], found[part], rtol=1e-12, atol=0)
        torch.testing.assert_close(alone[1], slopes[part], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_feels_only_its_own_log_prob(name: str) -> None:
    """The rest of the answer weighs, and has no gradient through it."""
    inputs = answers(1e-6)
    loss = POLICY_LOSSES[name].function(inputs, config_of(name, {})).loss
    (slopes,) = torch.autograd.grad(loss[4], inputs.log_probs)
    assert slopes[4] != 0 and slopes.count_nonzero() == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_weighs_every_loss(name: str) -> None:
    cfg = config_of(name, {"mismatch_correction": "tis", "support_telemetry": False})
    inputs = answers(0.01)
    inputs = dataclasses.replace(inputs, rollout_log_probs=inputs.old_log_probs - math.log(1.5))
    loss, _ = build_objective(cfg)(inputs, torch.ones_like(inputs.old_log_probs))
    assert loss.item() == pytest.approx(1.5 * evaluate(name, inputs)[0].sum().item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_whole_sequences_are_a_declared_need(name: str) -> None:
    assert "whole_sequences" in build_objective(config_of(name, {})).needs
    assert "whole_sequences" not in build_objective(config_of("vanilla", {})).needs


# --- one is another in disguise -------------------------------------------------------------------


def test_gspo_of_single_tokens_with_the_bounds_of_ppo_is_ppo() -> None:
    inputs = answers(0.5, lengths=(1,) * 60)
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    one, other = (evaluate(name, inputs, gspo=bounds, dual_clip=1.5) for name in ("gspo", "vanilla"))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert shares(one[2]) == shares(other[2])


def test_ctpo_of_single_tokens_is_ppo_with_bounds_in_log_space() -> None:
    inputs = answers(0.5, lengths=(1,) * 60)
    bounds = {"clip_low": 1 - math.exp(-0.3), "clip_high": math.exp(0.2) - 1, "dual_clip": math.exp(0.4)}
    expected = evaluate("vanilla", inputs, **bounds)
    for power in (0.0, 0.5):
        found = evaluate("ctpo", inputs, ctpo={"low": 0.3, "high": 0.2, "dual": 0.4, "power": power})
        torch.testing.assert_close(found[0], expected[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=0)


def test_ctpo_sees_the_tokens_before_and_not_those_after() -> None:
    inputs = answers(0.001, lengths=(6,))
    slopes = evaluate("ctpo", inputs)[1]
    for place in (1, 5):
        old = inputs.old_log_probs.clone()
        old[place] -= 0.001
        moved = evaluate("ctpo", dataclasses.replace(inputs, old_log_probs=old))[1]
        assert (moved != slopes).tolist() == [t >= place for t in range(6)]


def test_vespo_weighs_most_at_its_peak_and_forgets_what_is_far() -> None:
    def weight(log_w: float) -> float:
        log_probs = torch.full((2,), -3.0, dtype=torch.float64)
        ids = torch.zeros(2, dtype=torch.int64)
        inputs = inputs_of(log_probs, log_probs - log_w / 2, torch.ones_like(log_probs), ids)
        return shares(evaluate("vespo", inputs)[2])["sequence_weight"]

    peak = math.log(2 / 3)
    assert weight(0.0) == 1.0
    assert weight(peak) == pytest.approx((2 / 3) ** 2 * math.e)
    assert weight(peak) > max(weight(peak - 0.1), weight(peak + 0.1))
    assert weight(3.0) < 1e-20 and weight(-15.0) < 1e-10
