"""Losses that look at several tokens of the vocabulary: in float64 against their definitions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import POLICY_LOSSES, LossInputs, LossOutputs, build_objective
from apo_megatron.objectives.sequences import WholeSequences, sequence_quantile
from tests.objective_cases import shares
from tests.plain_top_tokens import TOP_TOKEN_LOSSES, Answer

NAMES = tuple(TOP_TOKEN_LOSSES)
VOCAB, K = 13, 4
LENGTHS = (9, 1, 4, 0, 25, 30, 6)
ADVANTAGES = (1.2, -0.8, 0.9, 1.0, -1.1, 0.7, 0.0)
SOLVE_RATES = (0.75, 0.0, 0.25, 0.5, 0.5, 1.0, 0.125)
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "strong": {
        "clip_low": 0.05,
        "clip_high": 0.03,
        "dual_clip": 1.5,
        "simko": {"topk": K, "mix": 0.6, "entropy_quantile": 0.3, "wrong_top1_factor": 1.7},
        "topk_forward_kl": {"weight": 0.8, "solve_rate_weighting": False},
    },
}
# What makes each of them vanilla.
OFF: dict[str, dict[str, Any]] = {
    "simko": {"simko": {"mix": 0.0, "wrong_top1_factor": 1.0, "entropy_quantile": 0.3}},
    "topk_forward_kl": {"topk_forward_kl": {"weight": 0.0}},
}


def config_of(name: str, settings: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"loss_mode": name, "apo_topk": K, **settings})


def make_answers(distance: float, seed: int = 0) -> tuple[Tensor, list[Answer]]:
    """Logits [T, V] with a gradient, and the answers that they are; the policies are ``distance`` apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = sum(LENGTHS), VOCAB
    sharpness = 4 * torch.rand(shape[0], 1, generator=generator, dtype=torch.float64)
    logits = (sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    noise = distance * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    old, reference = (logits.detach() + noise).log_softmax(2)
    targets = torch.randint(VOCAB, (shape[0],), generator=generator)
    targets[::2] = logits[::2].argmax(1)
    tensors = (logits.log_softmax(1), old, reference, targets)
    parts = (tensor.split(LENGTHS) for tensor in tensors)
    return logits, [Answer(*fields) for fields in zip(*parts, ADVANTAGES, SOLVE_RATES, strict=True)]


def inputs_of(answers: list[Answer], cfg: ObjectiveConfig) -> LossInputs:
    """What the actor passes for these answers."""
    log_probs, old, reference, targets = (
        torch.cat([getattr(answer, name) for answer in answers])
        for name in ("log_probs", "old", "reference", "targets")
    )
    lengths = torch.tensor([len(answer.targets) for answer in answers])
    of_answers = torch.tensor([[a.advantage, a.solve_rate] for a in answers], dtype=log_probs.dtype)
    advantages, solve_rates = of_answers.repeat_interleave(lengths, 0).unbind(1)
    at_targets = targets.unsqueeze(1)
    own = log_probs.detach().topk(cfg.simko.topk).indices
    of_reference = reference.topk(cfg.apo_topk)
    return LossInputs(
        log_probs=log_probs.gather(1, at_targets).squeeze(1),
        old_log_probs=old.gather(1, at_targets).squeeze(1),
        advantages=advantages,
        entropy=-(log_probs.exp() * log_probs).sum(1),
        sequence_ids=torch.arange(len(answers)).repeat_interleave(lengths),
        reference_topk_log_probs=of_reference.values,
        log_probs_at_reference_topk=log_probs.gather(1, of_reference.indices),
        policy_topk_log_probs=log_probs.gather(1, own),
        sampled_is_likeliest=own[:, 0] == targets,
        solve_rates=solve_rates,
        sequences=WholeSequences.all_here(torch.arange(len(answers)).repeat_interleave(lengths)),
    )


def as_leaves(inputs: LossInputs) -> LossInputs:
    """The same values; what carries a gradient is a leaf of its own."""
    names = ("log_probs", "log_probs_at_reference_topk", "policy_topk_log_probs", "entropy")
    return dataclasses.replace(
        inputs, **{name: getattr(inputs, name).detach().clone().requires_grad_() for name in names}
    )


def evaluate(name: str, inputs: LossInputs, settings: dict[str, Any]) -> LossOutputs:
    return POLICY_LOSSES[name].function(inputs, config_of(name, settings))


def leaf_gradients(loss: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Of the sum with respect to log pi(y), and at the Top-K of the policy and of the reference."""
    leaves = inputs.log_probs, inputs.policy_topk_log_probs, inputs.log_probs_at_reference_topk
    found = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)  # type: ignore[arg-type]
    return found[0], found[1], found[2]


# --- each against its definition ------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.0, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(name: str, distance: float, setting: str) -> None:
    logits, answers = make_answers(distance)
    cfg = config_of(name, SETTINGS[setting])
    found = evaluate(name, inputs_of(answers, cfg), SETTINGS[setting]).loss
    plain = torch.cat([TOP_TOKEN_LOSSES[name](a, cfg.model_dump()) for a in answers if len(a.targets)])
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    weights = torch.rand(len(found), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes, expected = (
        torch.autograd.grad((weights * loss).sum(), logits, retain_graph=True)[0] for loss in (found, plain)
    )
    torch.testing.assert_close(slopes, expected, rtol=1e-11, atol=1e-14)


def test_the_answers_reach_every_case() -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    _, answers = make_answers(0.5)
    inputs = inputs_of(answers, config_of("simko", SETTINGS["strong"]))
    for name in NAMES:
        found = shares(evaluate(name, inputs, SETTINGS["strong"]))
        for metric in ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction"):
            assert 0.01 < found[metric] < 0.99, (name, metric)
    outputs = evaluate("simko", inputs, SETTINGS["strong"])
    is_uncertain = outputs.metrics["uncertain_fraction"].values
    assert 0.3 < shares(outputs)["uncertain_fraction"] < 0.8
    for is_sign in (inputs.advantages > 0, inputs.advantages < 0):
        assert inputs.sampled_is_likeliest is not None
        for is_likeliest in (inputs.sampled_is_likeliest, ~inputs.sampled_is_likeliest):
            assert (is_uncertain & is_sign & is_likeliest).any() and (~is_uncertain & is_sign).any()


# --- the gradient at r = 1 ------------------------------------------------------------------------


def test_simko_at_the_old_policy() -> None:
    """-A ((1 - mix) d log pi(y) + mix / K sum_k d log pi(k)) where right, -1.7 A d log pi(y) where wrong."""
    _, answers = make_answers(0.0)
    inputs = as_leaves(inputs_of(answers, config_of("simko", SETTINGS["strong"])))
    outputs = evaluate("simko", inputs, SETTINGS["strong"])
    sampled, top, _ = leaf_gradients(outputs.loss, inputs)
    is_uncertain, advantages = outputs.metrics["uncertain_fraction"].values, inputs.advantages
    assert inputs.sampled_is_likeliest is not None
    is_sharpened = is_uncertain & (advantages < 0) & inputs.sampled_is_likeliest
    is_mixed = is_uncertain & (advantages > 0)
    factors = torch.ones_like(advantages).masked_fill(is_mixed, 1 - 0.6).masked_fill(is_sharpened, 1.7)
    torch.testing.assert_close(sampled, -advantages * factors, rtol=1e-13, atol=0)
    expected = torch.where(is_mixed, -advantages * 0.6 / K, 0.0).unsqueeze(1).expand(-1, K)
    torch.testing.assert_close(top, expected, rtol=1e-13, atol=0)
    assert not any(value for key, value in shares(outputs).items() if "clip" in key)


def test_forward_kl_at_the_old_policy() -> None:
    _, answers = make_answers(0.0)
    inputs = as_leaves(inputs_of(answers, config_of("topk_forward_kl", {})))
    sampled, _, top = leaf_gradients(evaluate("topk_forward_kl", inputs, {}).loss, inputs)
    torch.testing.assert_close(sampled, -inputs.advantages, rtol=1e-13, atol=0)
    assert inputs.solve_rates is not None and inputs.reference_topk_log_probs is not None
    weights = 0.05 * (1 - inputs.solve_rates) ** 2
    expected = -weights.unsqueeze(1) * inputs.reference_topk_log_probs.exp()
    torch.testing.assert_close(top, expected, rtol=1e-13, atol=0)


def test_the_forward_kl_on_the_whole_vocabulary_is_one() -> None:
    """With K = V it is KL(pi_ref || pi_theta); beyond the vocabulary there is nothing to add."""
    logits, answers = make_answers(0.5)
    settings = {"apo_topk": VOCAB, "topk_forward_kl": {"weight": 1.0, "solve_rate_weighting": False}}
    inputs = inputs_of(answers, config_of("topk_forward_kl", settings))
    absent = torch.full((len(logits), 2), -math.inf, dtype=torch.float64)
    assert inputs.reference_topk_log_probs is not None and inputs.log_probs_at_reference_topk is not None
    beyond = dataclasses.replace(
        inputs,
        reference_topk_log_probs=torch.cat([inputs.reference_topk_log_probs, absent], 1),
        log_probs_at_reference_topk=torch.cat([inputs.log_probs_at_reference_topk, absent], 1),
    )
    log_probs, reference = (
        torch.cat([getattr(a, name) for a in answers]) for name in ("log_probs", "reference")
    )
    expected = torch.nn.functional.kl_div(log_probs, reference, log_target=True, reduction="none").sum(1)
    (slopes,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    policy = evaluate("vanilla", inputs, settings).loss
    for case in (inputs, beyond):
        kl = evaluate("topk_forward_kl", case, settings).loss - policy
        torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)
        (found,) = torch.autograd.grad(kl.sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, slopes, rtol=1e-9, atol=1e-12)


# --- one is another in disguise -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_without_what_is_its_own_it_is_vanilla(name: str, dtype: torch.dtype) -> None:
    _, answers = make_answers(0.5)
    of_dtype = [
        dataclasses.replace(a, **{n: getattr(a, n).to(dtype) for n in ("log_probs", "old", "reference")})
        for a in answers
    ]
    settings = {**OFF[name], "clip_low": 0.05, "clip_high": 0.03, "dual_clip": 1.5}
    inputs = as_leaves(inputs_of(of_dtype, config_of(name, settings)))
    found, vanilla = (evaluate(n, inputs, settings).loss for n in (name, "vanilla"))
    assert found.dtype == dtype and torch.equal(found, vanilla)
    slopes, expected = (leaf_gradients(loss, inputs) for loss in (found, vanilla))
    assert all(torch.equal(one, other) for one, other in zip(slopes, expected, strict=True))


def test_simko_is_vanilla_where_no_token_is_uncertain() -> None:
    _, answers = make_answers(0.5)
    settings = {"simko": {"mix": 0.6, "wrong_top1_factor": 2.0, "entropy_quantile": 1.0}}
    inputs = inputs_of(answers, config_of("simko", settings))
    assert torch.equal(evaluate("simko", inputs, settings).loss, evaluate("vanilla", inputs, {}).loss)


# --- what all losses must stand -------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_probabilities_stay_finite(name: str, dtype: torch.dtype, setting: str) -> None:
    logs = torch.tensor([0.0, -1e-7, -19.0, -21.0, -1000.0], dtype=dtype)
    signs = torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)
    sampled, old, advantages, other = torch.cartesian_prod(logs, logs, signs, logs).unbind(1)
    absent = torch.full_like(other, -math.inf)
    ids = torch.arange(len(sampled)) // 5
    inputs = as_leaves(
        LossInputs(
            log_probs=sampled,
            old_log_probs=old,
            advantages=advantages,
            entropy=torch.arange(len(sampled), dtype=dtype),
            sequence_ids=ids,
            reference_topk_log_probs=torch.stack([other, sampled, absent], 1),
            log_probs_at_reference_topk=torch.stack([sampled, old, absent], 1),
            policy_topk_log_probs=torch.stack([other, sampled, absent], 1),
            sampled_is_likeliest=sampled >= other,
            solve_rates=torch.full_like(sampled, 0.5),
            sequences=WholeSequences.all_here(ids),
        )
    )
    outputs = evaluate(name, inputs, SETTINGS[setting])
    assert outputs.loss.dtype == dtype and outputs.loss.isfinite().all()
    assert all(slopes.isfinite().all() for slopes in leaf_gradients(outputs.loss, inputs))
    assert all(math.isfinite(value) for value in shares(outputs).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_token_has_no_loss_and_the_same_metrics(name: str) -> None:
    _, answers = make_answers(0.5)
    cfg = config_of(name, {})
    some, none = evaluate(name, inputs_of(answers, cfg), {}), evaluate(name, inputs_of(answers[3:4], cfg), {})
    assert none.loss.shape == (0,) and none.loss.sum().requires_grad
    assert some.metrics.keys() == none.metrics.keys() and some.metrics


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_does_not_see_the_others(name: str) -> None:
    _, answers = make_answers(0.5)
    cfg = config_of(name, SETTINGS["strong"])
    whole = evaluate(name, inputs_of(answers, cfg), SETTINGS["strong"]).loss.split(LENGTHS)
    for chosen in ([4], [5, 0], [1, 2, 6]):
        part = evaluate(name, inputs_of([answers[i] for i in chosen], cfg), SETTINGS["strong"]).loss
        assert torch.equal(part, torch.cat([whole[i] for i in chosen]))


def test_the_entropy_decides_without_a_gradient() -> None:
    _, answers = make_answers(0.5)
    inputs = as_leaves(inputs_of(answers, config_of("simko", {})))
    (slopes,) = torch.autograd.grad(
        evaluate("simko", inputs, {}).loss.sum(), inputs.entropy, allow_unused=True
    )
    assert slopes is None


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_weighs_every_loss(name: str) -> None:
    _, answers = make_answers(0.5)
    cfg = config_of(name, {"mismatch_correction": "tis"})
    inputs = inputs_of(answers, cfg)
    inputs = dataclasses.replace(inputs, rollout_log_probs=inputs.old_log_probs - math.log(1.5))
    loss, metrics = build_objective(cfg)(inputs, torch.ones_like(inputs.old_log_probs))
    assert loss.item() == pytest.approx(1.5 * evaluate(name, inputs, {}).loss.sum().item(), rel=1e-12)
    assert {"entropy", "policy_loss", "kl_old"} <= metrics.keys()


# --- quantiles of sequences -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_quantile_of_each_sequence(quantile: float, dtype: torch.dtype) -> None:
    """Of sequences with 1 to 21 tokens, one of them with equal values."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((n,), 7 * n) for n in (*range(1, 12), 21, 16)])
    values = torch.randn(len(ids), generator=generator, dtype=dtype)
    values[ids == 35] = 0.25
    found = sequence_quantile(values, quantile, WholeSequences.all_here(ids))
    assert found.dtype == dtype
    for i in ids.unique().tolist():
        of_sequence, num_tokens = values[ids == i], i // 7
        expected = torch.quantile(of_sequence, quantile).expand(num_tokens)
        torch.testing.assert_close(found[ids == i], expected, rtol=1e-6, atol=1e-7)
        num_above = 0 if i == 35 else math.ceil((1 - quantile) * (num_tokens - 1) - 1e-9)
        assert (of_sequence > found[ids == i]).sum() == num_above


# --- declarations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("telemetry", [True, False])
def test_what_the_actor_has_to_prepare(telemetry: bool) -> None:
    simko = build_objective(config_of("simko", {"support_telemetry": telemetry, "simko": {"topk": 5}}))
    assert simko.policy_topk == 5 and not simko.needs_support_log_probs
    assert simko.reference_scope == ("wrong" if telemetry else "none")
    kl = build_objective(config_of("topk_forward_kl", {"support_telemetry": telemetry}))
    assert kl.needs == {"reference_topk", "solve_rates"} and kl.reference_scope == "all"
    assert kl.needs_support and kl.support_size == K and kl.needs_support_log_probs and kl.policy_topk == 0
    apo = build_objective(ObjectiveConfig(support_telemetry=telemetry))
    assert not apo.needs_support_log_probs and apo.policy_topk == 0
    for spec in POLICY_LOSSES.values():
        assert ("policy_topk" in spec.needs) == (spec.policy_topk is not None)


def test_sources_are_stated() -> None:
    text = POLICY_LOSSES["simko"].function.__doc__ or ""
    assert "arXiv 2510.14807" in text and "[code]" in text
    text = POLICY_LOSSES["topk_forward_kl"].function.__doc__ or ""
    assert "from no paper" in text and "not APO" in text
