"""The whole objective in float64 on unsharded logits: loss and gradient against the definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import LossInputs, MetricSums, build_objective, supervised_objective
from tests.objective_cases import (
    LENGTHS,
    MODES,
    SETTINGS,
    Case,
    config,
    inputs_of,
    make_case,
    metric_values,
    select,
    token_weights,
)


def plain_token_losses(case: Case, cfg: ObjectiveConfig, logits: Tensor) -> Tensor:
    """The definitions in probabilities, token by token, without logs or masks."""
    losses = []
    probs, reference, support = logits.softmax(-1), case.reference.exp(), case.support(cfg)
    for t, y in enumerate(case.targets.tolist()):
        advantage = case.advantages[t].item()
        ratio = probs[t, y] / case.old_log_probs[t].exp()
        if cfg.loss_mode == "apo_ratio" and advantage < 0:
            chosen = support[t].nonzero()[:, 0]
            pull = probs[t, chosen].sum() / reference[t, chosen].sum() if len(chosen) else 0.0
            ratio = cfg.apo_push_coeff * ratio - cfg.apo_pull_coeff * pull
        clipped = min(max(ratio.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
        loss = (
            -advantage * ratio
            if -advantage * ratio > -advantage * clipped
            else ratio * 0 - advantage * clipped
        )
        if 1 - cfg.clip_low <= ratio <= 1 + cfg.clip_high:
            loss = -advantage * ratio
        if cfg.dual_clip is not None and advantage < 0 and loss > -advantage * cfg.dual_clip:
            loss = ratio * 0 - advantage * cfg.dual_clip
        if cfg.use_kl_loss or (cfg.use_kl_loss_on_wrong and advantage < 0):
            x = reference[t, y] / probs[t, y]
            kl = {"k1": -x.log(), "k2": x.log() ** 2 / 2, "k3": x - 1 - x.log()}[cfg.kl_estimator]
            loss = loss + cfg.kl_loss_coeff * kl
        losses.append(loss + cfg.entropy_coeff * (probs[t] * probs[t].log()).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.0, 0.3, 2.0])
def test_loss_and_gradient_of_the_logits(mode: str, setting: str, distance: float) -> None:
    cfg, case = config(mode, setting), make_case(distance)
    weights = token_weights(case, cfg)
    loss, _ = build_objective(cfg)(inputs_of(case, cfg), weights)
    expected = (weights * plain_token_losses(case, cfg, case.logits)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    if distance == 0.0 and setting == "narrow_clip":
        return  # r~ = 0.95 and r = 1 lie next to the bounds: which side autograd takes is rounding
    found = torch.autograd.grad(loss, case.logits)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, case.logits)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", ["plain", "kl_on_wrong", "entropy", "k1_of_topk", "dual_clip"])
def test_gradient_by_finite_differences(setting: str) -> None:
    cfg, case = config("apo_ratio", setting), make_case()
    weights = token_weights(case, cfg)

    def loss(logits: Tensor) -> Tensor:
        return build_objective(cfg)(inputs_of(case, cfg, logits), weights)[0]

    assert torch.autograd.gradcheck(loss, (case.logits,), fast_mode=True)


def test_the_cases_reach_every_branch() -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    cfg = config("apo_ratio", "dual_clip")
    near, far = (metric_values(make_case(distance), cfg) for distance in (0.3, 2.0))
    for name in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"):
        assert 0 < far[name] < 1, name
    assert 0 < near["rectified_clip_fraction"] < 1 and 0 < near["sampled_in_support"] < 1
    mass = inputs_of(make_case(), config("apo_ratio", "k1_of_topk")).reference_anchor_log_mass
    assert mass is not None and mass.isneginf().any() and mass.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.0, 0.5, 3.0])
def test_push_one_pull_zero_is_vanilla_bit_for_bit(dtype: torch.dtype, distance: float) -> None:
    case = make_case(distance)
    results = []
    for mode in MODES:
        cfg = ObjectiveConfig(loss_mode=mode, apo_push_coeff=1.0, apo_pull_coeff=0.0)
        logits = case.logits.detach().to(dtype).requires_grad_()
        inputs = inputs_of(case, cfg, logits)
        inputs = dataclasses.replace(
            inputs,
            old_log_probs=inputs.old_log_probs.to(dtype),
            advantages=inputs.advantages.to(dtype),
            reference_anchor_log_mass=torch.full_like(inputs.old_log_probs, -1e4),  # a = inf
        )
        loss, _ = build_objective(cfg)(inputs, token_weights(case, cfg).to(dtype))
        results.append((loss, torch.autograd.grad(loss, logits)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_gradient_at_theta_old_ref() -> None:
    """There r = a = 1: factor 1 for vanilla, 1.05 with -0.1 d log P for APO where A < 0, 1 elsewhere."""
    case = make_case(0.0)
    for mode in MODES:
        cfg = config(mode, "plain")
        inputs = inputs_of(case, cfg)
        loss, _ = build_objective(cfg)(inputs, torch.ones_like(case.old_log_probs))
        push, pull = (1.05, 0.1) if mode == "apo_ratio" else (1.0, 0.0)
        wrong = case.advantages < 0
        assert inputs.anchor_log_mass is not None
        by_hand = torch.where(wrong, push * inputs.log_probs, inputs.log_probs)
        by_hand = by_hand - torch.where(wrong, pull * inputs.anchor_log_mass, 0.0)
        expected = torch.autograd.grad((-case.advantages * by_hand).sum(), case.logits, retain_graph=True)[0]
        found = torch.autograd.grad(loss, case.logits)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_right_tokens_never_touch_what_is_missing(mode: Literal["apo_ratio", "vanilla"]) -> None:
    cfg = ObjectiveConfig(loss_mode=mode, use_kl_loss_on_wrong=True, dual_clip=3.0, entropy_coeff=0.01)
    case = make_case()
    inputs = inputs_of(case, cfg)
    right = case.advantages >= 0
    assert inputs.anchor_log_mass is not None and inputs.reference_anchor_log_mass is not None
    for missing in (math.nan, -math.inf, math.inf):
        broken = dataclasses.replace(
            inputs,
            anchor_log_mass=torch.where(right, -math.inf, inputs.anchor_log_mass),
            reference_anchor_log_mass=torch.where(right, missing, inputs.reference_anchor_log_mass),
            reference_log_probs=torch.where(right, missing, inputs.reference_log_probs),  # type: ignore[arg-type]
        )
        loss, metrics = build_objective(cfg)(broken, token_weights(case, cfg))
        assert (
            torch.autograd.grad(loss, case.logits, retain_graph=True)[0].isfinite().all() and loss.isfinite()
        )
        sums = MetricSums()
        sums.add(metrics)
        assert all(math.isfinite(value) for value in sums.finalize().values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["plain", "kl", "per_sequence", "constant"])
def test_no_split_changes_loss_gradient_or_metrics(mode: str, setting: str) -> None:
    cfg, case = config(mode, setting), make_case()
    objective, weights = build_objective(cfg), token_weights(case, cfg)
    whole, metrics = objective(inputs_of(case, cfg), weights)
    whole_sums = MetricSums()
    whole_sums.add(metrics)
    gradient = torch.autograd.grad(whole, case.logits)[0]
    assert whole_sums.finalize()["loss"] == pytest.approx(whole.item(), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for num_parts in (1, 2, 5):
        part_of = torch.randint(num_parts, (len(LENGTHS),), generator=generator)[case.sequence_ids]
        total, sums = torch.zeros((), dtype=torch.float64), MetricSums()
        for part in range(num_parts + 1):  # the last part has no token at all
            rows = part_of == part
            loss, metrics = objective(select(inputs_of(case, cfg), rows), weights[rows])
            total = total + loss
            sums.add(metrics)
        torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(
            torch.autograd.grad(total, case.logits)[0], gradient, rtol=1e-12, atol=1e-15
        )
        assert sums.finalize() == pytest.approx(whole_sums.finalize(), rel=1e-12, nan_ok=False)


def test_tokens_of_weight_zero_add_nothing() -> None:
    cfg, case = config("vanilla", "plain"), make_case()
    inputs, weights = inputs_of(case, cfg), token_weights(case, cfg)
    inputs = dataclasses.replace(
        inputs, old_log_probs=inputs.old_log_probs.masked_fill(weights == weights[0], math.nan)
    )
    loss, _ = build_objective(cfg)(inputs, torch.where(weights == weights[0], 0.0, weights))
    assert loss.item() == 0.0


def test_supervised_is_cross_entropy_and_looks_at_nothing_else() -> None:
    case = make_case()
    log_probs = case.logits.log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    nothing = torch.full_like(case.old_log_probs, math.nan)
    inputs = LossInputs(log_probs, nothing, nothing, case.old_log_probs, case.sequence_ids)
    weights = torch.full_like(case.old_log_probs, 1 / len(case.targets))
    loss, metrics = supervised_objective()(inputs, weights)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(case.logits, case.targets))
    assert metrics.keys() == {"loss", "entropy"}


def test_entropy_bonus_raises_the_entropy() -> None:
    cfg = ObjectiveConfig(loss_mode="vanilla", entropy_coeff=0.5)
    case = make_case()
    inputs = dataclasses.replace(inputs_of(case, cfg), advantages=torch.zeros_like(case.old_log_probs))
    loss, _ = build_objective(cfg)(inputs, torch.ones_like(case.old_log_probs))
    torch.testing.assert_close(loss, -0.5 * inputs.entropy.sum())
    step = case.logits.detach() - 0.1 * torch.autograd.grad(loss, case.logits)[0]
    assert inputs_of(case, cfg, step).entropy.sum() > inputs.entropy.sum()
