"""Losses that look at the whole mini-batch: in float64 against their definitions, on one rank or several."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apo_megatron.objectives import POLICY_LOSSES, LossInputs, build_objective, sequence_weights
from apo_megatron.objectives.aggregation import LossAggregation
from apo_megatron.objectives.selection import draw, largest, token_keys
from tests.batch_wide_cases import (
    NAMES,
    SETTINGS,
    config_of,
    evaluate,
    flat,
    make_answers,
    mini_batch_inputs,
    on_ranks,
    statistics,
    with_statistics,
)
from tests.objective_cases import shares
from tests.plain_batch_losses import PLAIN_BATCH_LOSSES, Answer, bapo_bounds

# --- each against its definition ------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(
    name: str, distance: float, setting: str, aggregation: LossAggregation
) -> None:
    answers = make_answers(distance)
    constant = 16 if aggregation.endswith("norm") else None
    cfg = config_of(
        name,
        {
            **SETTINGS[setting],
            "loss_aggregation": aggregation,
            "loss_aggregation_constant": constant,
        },
    )
    lengths = torch.tensor([len(a.log_probs) for a in answers])
    weights = sequence_weights(aggregation, lengths, constant)
    inputs = with_statistics(name, answers, cfg)
    found, metrics = build_objective(cfg)(inputs, weights.repeat_interleave(lengths))
    losses, added = PLAIN_BATCH_LOSSES[name](answers, cfg.model_dump())
    expected = sum(w * sum(of_answer) for w, of_answer in zip(weights, losses, strict=True)) + added
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    leaves = [a.log_probs for a in answers]
    for slope, wanted in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-14)
    assert metrics["loss"].values.sum().item() == pytest.approx(found.item(), rel=1e-12)


def test_the_answers_reach_every_bound() -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    found = {name: shares(evaluate(name, make_answers(0.5), **SETTINGS["narrow"])[2]) for name in NAMES}
    assert found["clip_cov"]["covariance_share"] == pytest.approx(0.1, abs=0.01)
    assert found["kl_cov"]["covariance_share"] == pytest.approx(0.15, abs=0.01)
    assert found["bapo"]["bapo_low"] == pytest.approx(0.7) and 1.3 < found["bapo"]["bapo_high"] < 3.9
    assert 0.5 < found["p3o"]["ess"] < 0.95
    assert found["dmpo"]["dmpo_distance"] > 0.01
    for name in ("clip_cov", "bapo", "dmpo"):
        assert min(found[name]["clip_fraction_low"], found[name]["clip_fraction_high"]) > 0.02


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NAMES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(name: str, setting: str) -> None:
    answers = make_answers(0.0)
    _, slopes, outputs = evaluate(name, answers, **SETTINGS[setting])
    expected = -flat(answers).advantages
    if name == "clip_cov":  # but for the tokens that it draws
        is_drawn = outputs.metrics["covariance_share"].values
        assert is_drawn.any()
        expected = torch.where(is_drawn, 0.0, expected)
    torch.testing.assert_close(slopes, expected, rtol=1e-13, atol=0)
    found = shares(outputs)
    assert not any(value for key, value in found.items() if "fraction" in key)
    assert found.get("ess", 1.0) == 1.0


# --- in any layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NAMES)
def test_ranks_find_together_what_one_finds_alone(name: str, setting: str) -> None:
    answers, cfg = make_answers(0.5), config_of(name, SETTINGS[setting])
    alone = statistics(name, mini_batch_inputs(answers), cfg)
    starts = torch.tensor([0] + [len(a.log_probs) for a in answers]).cumsum(0).tolist()
    order = np.random.default_rng(1).permutation(len(answers)).tolist()
    shares = [order[:5], [], order[5:6], order[6:]]  # groups lie on several ranks, and one rank has nothing
    results = on_ranks(
        [[answers[i] for i in share] for share in shares], lambda inputs: statistics(name, inputs, cfg)
    )
    for share, found in zip(shares, results, strict=True):
        for key, values in found.items():
            wanted = [alone[key][starts[i] : starts[i + 1]] for i in share]
            torch.testing.assert_close(values, torch.cat([alone[key][:0], *wanted]), rtol=1e-12, atol=1e-15)


def test_a_tie_is_broken_by_the_token_and_not_by_its_place() -> None:
    answers = make_answers(0.0)
    keys = token_keys(mini_batch_inputs(answers))
    ordered = keys.sort().values
    for count in (0, 1, 7):
        alone = largest(torch.ones(len(keys)), count, mini_batch_inputs(answers))
        assert torch.equal(alone, keys < ordered[count])
    parts = [answers[7:], answers[:7]]
    found = on_ranks(parts, lambda i: {"": largest(torch.ones_like(i.log_probs), 7, i)})
    assert torch.equal(torch.cat([found[1][""], found[0][""]]), keys < ordered[7])


def test_the_draw_takes_so_many_of_the_candidates_evenly() -> None:
    counts = torch.zeros(5)
    for seed in range(400):
        one = Answer(torch.full((5,), -1.0, dtype=torch.float64), torch.zeros(5), 1.0, seed=seed)
        candidates = torch.tensor([True, True, False, True, True])
        drawn = draw(candidates, 2, mini_batch_inputs([one]))
        assert drawn.sum() == 2
        counts += drawn
    assert counts[2] == 0 and (counts[[0, 1, 3, 4]] - 200).abs().max() < 50  # 5 standard deviations
    assert torch.equal(draw(candidates, 9, mini_batch_inputs([one])), candidates)


# --- what they have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_probabilities_stay_finite(name: str, dtype: torch.dtype, setting: str) -> None:
    logs = torch.tensor([0.0, -1e-7, -19.0, -21.0, -100.0, -1000.0], dtype=torch.float64)
    now, old = torch.cartesian_prod(logs, logs).unbind(1)
    answers = [Answer(now.clone(), old, a, seed=i) for i, a in enumerate((-2.0, 0.0, 2.0))]
    cfg = config_of(name, SETTINGS[setting])
    found = statistics(name, mini_batch_inputs(answers), cfg)
    tokens = flat(answers)
    inputs = LossInputs(
        log_probs=tokens.log_probs.detach().to(dtype).requires_grad_(),
        old_log_probs=tokens.old_log_probs.to(dtype),
        advantages=tokens.advantages.to(dtype),
        entropy=torch.zeros_like(tokens.advantages, dtype=dtype),
        sequence_ids=tokens.sequence_ids,
        statistics={key: values.to(dtype) for key, values in found.items()},
    )
    outputs = POLICY_LOSSES[name].function(inputs, cfg)
    total = outputs.loss if outputs.unweighted is None else outputs.loss + outputs.unweighted
    (slopes,) = torch.autograd.grad(total.sum(), inputs.log_probs)
    assert total.isfinite().all() and slopes.isfinite().all() and total.dtype == dtype
    assert all(math.isfinite(value) for value in shares(outputs).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_token_has_no_loss_and_the_same_metrics(name: str) -> None:
    answers, cfg = make_answers(0.5), config_of(name, {"dual_clip": 3.0})
    found = on_ranks([answers, []], lambda inputs: statistics(name, inputs, cfg))
    some, none = (
        build_objective(cfg)(dataclasses.replace(flat(part), statistics=values), torch.ones(num))
        for part, values, num in zip((answers, []), found, (len(flat(answers).log_probs), 0), strict=True)
    )
    assert none[0].item() == 0 and none[0].requires_grad
    assert none[1].keys() == some[1].keys()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_weight_zero_add_nothing(name: str) -> None:
    cfg = config_of(name, {})
    inputs = with_statistics(name, make_answers(0.5), cfg)
    loss, _ = build_objective(cfg)(inputs, torch.zeros_like(inputs.advantages))
    assert loss.item() == 0 and not torch.autograd.grad(loss, inputs.log_probs)[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_weighs_the_loss_of_a_token_alone(name: str) -> None:
    cfg = config_of(name, {"mismatch_correction": "tis"})
    answers = make_answers(0.5)
    inputs = with_statistics(name, answers, cfg)
    inputs = dataclasses.replace(inputs, rollout_log_probs=inputs.old_log_probs - math.log(1.5))
    loss, _ = build_objective(cfg)(inputs, torch.ones_like(inputs.advantages))
    outputs = evaluate(name, answers)[2]
    added = 0.0 if outputs.unweighted is None else outputs.unweighted.sum().item()
    assert loss.item() == pytest.approx(1.5 * outputs.loss.sum().item() + added, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_probability_that_is_not_a_number_ends_in_a_loss_that_is_none(name: str) -> None:
    """Such an update is skipped and counted; it must not end the run."""
    answers = make_answers(0.5)
    broken = answers[4].log_probs.detach().clone()
    broken[0] = math.nan
    answers[4] = dataclasses.replace(answers[4], log_probs=broken)
    cfg = config_of(name, {})
    inputs = with_statistics(name, answers, cfg)
    loss, _ = build_objective(cfg)(inputs, torch.ones_like(inputs.advantages))
    assert math.isnan(loss.item())


# --- one is another in disguise -------------------------------------------------------------------


def assert_same(one: tuple[Tensor, Tensor, Any], other: tuple[Tensor, Tensor, Any]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_clip_cov_that_draws_nothing_is_ppo() -> None:
    answers = make_answers(0.5)
    bounds = {"clip_low": 0.2, "clip_high": 0.28}
    found = evaluate("clip_cov", answers, clip_cov={"share": 0.0, **bounds}, dual_clip=3.0)
    assert_same(found, evaluate("vanilla", answers, **bounds, dual_clip=3.0))
    assert shares(found[2])["covariance_share"] == 0


def test_kl_cov_without_its_term_is_the_ratio_without_a_clip() -> None:
    answers = make_answers(0.5)
    tokens = flat(answers)
    expected = -tokens.advantages * (tokens.log_probs - tokens.old_log_probs).exp()
    for settings in ({"coeff": 0.0}, {"share": 0.0}):
        loss, slopes, _ = evaluate("kl_cov", answers, kl_cov=settings)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(slopes, expected.detach(), rtol=1e-13, atol=0)


def test_bapo_without_a_target_is_ppo_between_its_first_bounds() -> None:
    answers = make_answers(0.5)
    settings = {"target": 0.0, "low_start": 0.75, "high_start": 1.25}  # exact in binary
    found = evaluate("bapo", answers, bapo=settings, dual_clip=3.0)
    assert_same(found, evaluate("vanilla", answers, clip_low=0.25, clip_high=0.25, dual_clip=3.0))


def test_p3o_is_the_policy_gradient_where_the_policy_has_not_moved() -> None:
    answers = make_answers(0.0)
    tokens = flat(answers)
    loss, _, _ = evaluate("p3o", answers)
    torch.testing.assert_close(loss, (-tokens.advantages * tokens.log_probs).detach(), rtol=1e-13, atol=0)


def test_dmpo_without_its_term_is_vanilla() -> None:
    answers = make_answers(0.5)
    found = evaluate("dmpo", answers, dmpo={"coeff": 0.0})
    assert_same(found, evaluate("vanilla", answers))
    assert found[2].unweighted is not None and not found[2].unweighted.any()


def test_bapo_raises_its_bounds_in_order_and_no_further_than_needed() -> None:
    def bounds(right: float, **settings: float) -> tuple[float, float]:
        old = torch.zeros(2, dtype=torch.float64)
        ratios = torch.tensor([0.5, 2.0], dtype=torch.float64).log()
        answers = [Answer(ratios, old, -1.0), Answer(ratios, old, right)]
        cfg = config_of("bapo", {"bapo": settings})
        found = statistics("bapo", mini_batch_inputs(answers), cfg)
        pair = found["low"][0].item(), found["high"][0].item()
        assert pair == pytest.approx(bapo_bounds(answers, cfg.bapo.model_dump()), rel=1e-12)
        return pair

    # Right answers weigh (0.5 + high) right, wrong ones low + 2.
    assert bounds(1.0) == (0.8, 1.2)
    assert bounds(0.8) == (pytest.approx(0.95), pytest.approx(1.4))
    assert bounds(0.1) == (pytest.approx(0.95), 2.0)
    assert bounds(0.0) == (pytest.approx(0.95), 2.0)
    assert bounds(0.8, low_max=0.8) == (0.8, pytest.approx(1.3))


def test_dmpo_draws_a_group_towards_its_target_alone() -> None:
    """Descent on the term lowers it, and answers of a group with p = q are left where they are."""
    answers = make_answers(0.5)
    scores = [a.log_probs.detach().mean().item() for a in answers]
    matched = [
        dataclasses.replace(a, advantage=s) if a.group == 0 else a
        for a, s in zip(answers, scores, strict=True)
    ]
    outputs = evaluate("dmpo", matched, dmpo={"temperature": 1.0})[2]
    assert outputs.unweighted is not None
    slopes = torch.autograd.grad(outputs.unweighted.sum(), [a.log_probs for a in matched])
    for answer, slope in zip(matched, slopes, strict=True):
        assert bool(slope.abs().max() < 1e-15) == (answer.group == 0)
    moved = [
        dataclasses.replace(a, log_probs=(a.log_probs - 0.1 * slope).detach())
        for a, slope in zip(matched, slopes, strict=True)
    ]
    before, after = (
        shares(evaluate("dmpo", batch, dmpo={"temperature": 1.0})[2])["dmpo_distance"]
        for batch in (matched, moved)
    )
    assert after < before


@pytest.mark.parametrize("name", NAMES)
def test_sources_and_certainty_are_stated(name: str) -> None:
    text = POLICY_LOSSES[name].function.__doc__ or ""
    assert "arXiv" in text and ("[code]" in text or ("[second-hand]" in text and "Experimental" in text))
