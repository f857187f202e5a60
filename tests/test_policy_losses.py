"""The policy losses beside APO: in float64 against their definitions, and what they have in common."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.config.policy_losses import WHOLE_GROUPS
from apo_megatron.objectives import (
    MISMATCH_CORRECTIONS,
    POLICY_LOSSES,
    LossInputs,
    LossOutputs,
    build_objective,
)
from tests.certainty import assert_certainty_is_stated
from tests.objective_cases import shares
from tests.plain_batch_losses import PLAIN_BATCH_LOSSES
from tests.plain_losses import PLAIN_LOSSES, plain_loss
from tests.plain_sequence_losses import PLAIN_SEQUENCE_LOSSES
from tests.plain_top_tokens import TOP_TOKEN_LOSSES

METHODS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
NAMES = tuple(PLAIN_LOSSES)
# Every bound is reached by the tokens below.
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "narrow": {
        "clip_low": 0.05,
        "clip_high": 0.03,
        "dual_clip": 3.0,
        "cispo": {"clip_low": 0.3, "clip_high": 0.1},
        "dispo": {
            "right_clip_low": 0.1,
            "right_clip_high": 0.4,
            "wrong_clip_low": 0.2,
            "wrong_clip_high": 0.5,
        },
        "sapo": {"right_temperature": 3.0, "wrong_temperature": 0.5},
        "gppo": {"right_gradient": 0.5, "wrong_gradient": 0.75},
        "dcpo": {"clip_low": 0.01, "clip_high": 0.02, "max_ratio": 1.5},
        "dppo": {"max_increase": 0.02, "max_decrease": 0.03, "max_weight": 1.7},
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_tried_away_from_its_default(name: str) -> None:
    section = POLICY_LOSSES[name].settings
    if section is None:
        return
    defaults, narrow = getattr(ObjectiveConfig(), section), SETTINGS["narrow"].get(section, {})
    same = [field for field, value in defaults.model_dump().items() if narrow.get(field, value) == value]
    assert not same, f"SETTINGS['narrow'] of this file lacks other values for {section}: {', '.join(same)}"


def tokens(distance: float, seed: int = 0, num_tokens: int = 400) -> LossInputs:
    """Tokens of every probability, with A < 0, = 0 and > 0, ``distance`` from the old policy."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.empty(num_tokens, dtype=torch.float64).exponential_(0.5, generator=generator)
    moved = old + distance * torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    advantages[::10] = 0.0
    return inputs_of(moved.clamp(max=0.0), old, advantages)


def inputs_of(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> LossInputs:
    return LossInputs(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=old_log_probs,
        advantages=advantages,
        entropy=torch.zeros_like(old_log_probs),
        sequence_ids=torch.zeros_like(old_log_probs, dtype=torch.int64),
    )


def config_of(name: str, settings: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"loss_mode": name, **settings})


def evaluate(name: str, inputs: LossInputs, **settings: Any) -> tuple[Tensor, Tensor, LossOutputs]:
    """Loss [T], its gradient [T] with respect to the log-probs, and all outputs."""
    outputs = POLICY_LOSSES[name].function(inputs, config_of(name, settings))
    (slopes,) = torch.autograd.grad(outputs.loss.sum(), inputs.log_probs)
    return outputs.loss.detach(), slopes, outputs


# --- each against its definition ------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.0, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(name: str, distance: float, setting: str) -> None:
    inputs = tokens(distance)
    found, slopes, _ = evaluate(name, inputs, **SETTINGS[setting])
    settings = config_of(name, SETTINGS[setting]).model_dump()
    plain = plain_loss(name, inputs.log_probs, inputs.old_log_probs, inputs.advantages, settings)
    torch.testing.assert_close(found, plain.detach(), rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(plain.sum(), inputs.log_probs)[0]
    torch.testing.assert_close(slopes, expected, rtol=1e-11, atol=1e-14)


def test_the_tokens_reach_every_bound() -> None:
    """Otherwise the comparisons above would prove less than they seem to."""
    bounds = {
        **dict.fromkeys(("vanilla", "dcpo_clip", "dppo_tv"), ("clip_fraction_low", "clip_fraction_high")),
        **dict.fromkeys(("cispo", "dispo", "gppo"), ("bound_fraction_low", "bound_fraction_high")),
    }
    for name, metrics in bounds.items():
        found = shares(evaluate(name, tokens(0.5), **SETTINGS["narrow"])[2])
        assert all(0.01 < found[metric] < 0.99 for metric in metrics), (name, found)
    assert 0.1 < shares(evaluate("sapo", tokens(0.5), **SETTINGS["narrow"])[2])["soft_gate"] < 0.95
    for name in ("vanilla", "dcpo_clip", "gppo"):
        found = shares(evaluate(name, tokens(3.0), **SETTINGS["narrow"])[2])
        assert 0.01 < found["dual_clip_fraction"] < 0.5


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NAMES)
def test_at_the_old_policy_the_gradient_is_the_policy_gradient(name: str, setting: str) -> None:
    inputs = tokens(0.0)
    _, slopes, outputs = evaluate(name, inputs, **SETTINGS[setting])
    torch.testing.assert_close(slopes, -inputs.advantages, rtol=1e-13, atol=0)
    found = shares(outputs)
    assert not any(value for key, value in found.items() if "fraction" in key)
    assert found.get("soft_gate", 1.0) == 1.0


# --- what they have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_probabilities_stay_finite(name: str, dtype: torch.dtype, setting: str) -> None:
    logs = torch.tensor([0.0, -1e-7, -19.0, -21.0, -100.0, -1000.0], dtype=dtype)
    log_probs, old, advantages = torch.cartesian_prod(
        logs, logs, torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)
    ).unbind(1)
    found, slopes, outputs = evaluate(
        name, inputs_of(log_probs.clone(), old, advantages), **SETTINGS[setting]
    )
    assert found.isfinite().all() and slopes.isfinite().all()
    assert (found[advantages == 0] == 0).all() and (slopes[advantages == 0] == 0).all()
    assert found.dtype == dtype and all(math.isfinite(value) for value in shares(outputs).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_token_has_no_loss_and_the_same_metrics(name: str) -> None:
    some, none = tokens(0.5), tokens(0.5, num_tokens=0)
    found, slopes, outputs = evaluate(name, none, dual_clip=3.0)
    assert found.shape == slopes.shape == (0,)
    metrics = evaluate(name, some, dual_clip=3.0)[2].metrics
    assert metrics.keys() == outputs.metrics.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_token_does_not_see_the_others(name: str) -> None:
    whole = tokens(0.5)
    found, slopes, _ = evaluate(name, whole)
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(3))[:7]
    part = inputs_of(whole.log_probs[rows].detach(), whole.old_log_probs[rows], whole.advantages[rows])
    found_part, slopes_part, _ = evaluate(name, part)
    assert torch.equal(found_part, found[rows]) and torch.equal(slopes_part, slopes[rows])


@pytest.mark.parametrize("name", NAMES)
def test_a_correction_weighs_every_loss(name: str) -> None:
    cfg = config_of(name, {"mismatch_correction": "tis", "support_telemetry": False})
    inputs = tokens(0.5)
    inputs = dataclasses.replace(inputs, rollout_log_probs=inputs.old_log_probs - math.log(1.5))
    loss, _ = build_objective(cfg)(inputs, torch.ones_like(inputs.old_log_probs))
    assert loss.item() == pytest.approx(1.5 * evaluate(name, inputs)[0].sum().item(), rel=1e-12)


# --- one is another in disguise -------------------------------------------------------------------


def assert_same(one: tuple[Tensor, Tensor, Any], other: tuple[Tensor, Tensor, Any]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_gppo_without_its_gradients_is_ppo(dual_clip: float | None, dtype: torch.dtype) -> None:
    wide = tokens(3.0)
    inputs = inputs_of(*(x.detach().to(dtype) for x in (wide.log_probs, wide.old_log_probs, wide.advantages)))
    shut = {"right_gradient": 0.0, "wrong_gradient": 0.0}
    assert_same(
        evaluate("gppo", inputs, gppo=shut, dual_clip=dual_clip),
        evaluate("vanilla", inputs, dual_clip=dual_clip),
    )


def test_dispo_with_equal_bounds_is_cispo() -> None:
    low, high = 0.3, 0.7
    bounds = {"right_clip_low": low, "wrong_clip_low": low, "right_clip_high": high, "wrong_clip_high": high}
    cispo = evaluate("cispo", tokens(1.0), cispo={"clip_low": low, "clip_high": high})
    assert_same(evaluate("dispo", tokens(1.0), dispo=bounds), cispo)


def test_cispo_with_the_bounds_of_ppo_has_its_gradient_where_ppo_has_one() -> None:
    inputs = tokens(0.5)
    slopes = evaluate("cispo", inputs, cispo={"clip_low": 0.2, "clip_high": 0.28})[1]
    of_ppo = evaluate("vanilla", inputs)[1]
    ratio = (inputs.log_probs - inputs.old_log_probs).exp()
    inside = (ratio > 0.8) & (ratio < 1.28) & (inputs.advantages != 0)
    torch.testing.assert_close(slopes[inside], of_ppo[inside], rtol=1e-12, atol=0)
    assert (slopes[inputs.advantages != 0] != 0).all() and (of_ppo[inputs.advantages != 0] == 0).any()


def test_dppo_that_masks_nothing_is_cispo_without_a_lower_bound() -> None:
    open_mask = {"max_increase": 1.0, "max_decrease": 1.0, "max_weight": 5.0}
    assert_same(evaluate("dppo_tv", tokens(1.0), dppo=open_mask), evaluate("cispo", tokens(1.0)))


def test_sapo_between_ppo_without_a_clip_and_nothing() -> None:
    inputs = tokens(0.5)
    tiny, huge = (
        evaluate("sapo", inputs, sapo={"right_temperature": tau, "wrong_temperature": tau})[1]
        for tau in (1e-6, 1e9)
    )
    ratio = (inputs.log_probs - inputs.old_log_probs).exp().detach()
    torch.testing.assert_close(tiny, -inputs.advantages * ratio, rtol=1e-9, atol=1e-12)
    assert (huge[ratio != 1] == 0).all()


def test_dcpo_gives_rare_tokens_a_wider_range() -> None:
    cases = (  # q, lower and upper bound; where q = 1 no ratio is above 1
        (0.8, 0.5, (1 + math.sqrt(2.4)) / 2),
        (1e-4, 0.5, 10.0),
        (1.0, (1 + math.sqrt(0.2)) / 2, 1.0),
    )
    for q, low, high in cases:
        for ratio, sign, has_gradient in (
            (low * 0.999, -1.0, False),
            (low * 1.001, -1.0, True),
            (high * 0.999, 1.0, True),
            (high * 1.001, 1.0, q == 1.0),
        ):
            log_ratio, old, advantage = torch.tensor(
                [[math.log(ratio)], [math.log(q)], [sign]], dtype=torch.float64
            )
            inputs = inputs_of(old + log_ratio, old, advantage)
            assert (evaluate("dcpo_clip", inputs)[1].item() != 0) is has_gradient, (q, ratio)


# --- the registries -------------------------------------------------------------------------------


def test_what_a_configuration_may_name_is_what_is_registered() -> None:
    modes = get_args(ObjectiveConfig.model_fields["loss_mode"].annotation)
    assert {*modes, "supervised"} == set(POLICY_LOSSES)
    # Each has a definition to be compared with; that of gbpo is in test_bounded_ratio.py.
    families = (NAMES, PLAIN_SEQUENCE_LOSSES, TOP_TOKEN_LOSSES, PLAIN_BATCH_LOSSES)
    assert {*(name for family in families for name in family), "apo_ratio", "gbpo"} == set(modes)
    corrections = get_args(ObjectiveConfig.model_fields["mismatch_correction"].annotation)
    assert set(corrections) == set(MISMATCH_CORRECTIONS)
    assert set(WHOLE_GROUPS) == {name for name, spec in POLICY_LOSSES.items() if spec.whole_groups}


def test_the_page_of_methods_has_a_row_for_each() -> None:
    page = METHODS_PAGE.read_text()
    rows = {
        section.split("\n", 1)[0]: set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
        for section in page.split("\n## ")
    }
    on_rollouts = {name for name, spec in POLICY_LOSSES.items() if spec.uses_rollouts}
    assert rows["Policy losses"] == {"loss_mode", *on_rollouts}  # the first is the head of the table
    assert rows["Corrections"] == {"mismatch_correction", *MISMATCH_CORRECTIONS}


NEEDS_IN_WORDS = {
    "anchor": "reference Top-K where A < 0",
    "policy_topk": "policy's Top-K",
    "reference_topk": "reference Top-K",
    "solve_rates": "solve rate of the prompt",
    "target_advantages": "a second number a sample",
    "whole_sequences": "whole answers",
}


def test_the_page_of_methods_says_what_each_needs_and_where_it_comes_from() -> None:
    table = METHODS_PAGE.read_text().partition("\n## Policy losses")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| `(?!loss_mode).* \|$", table, re.MULTILINE):
        name, _paper, _loss, _defaults, needs, certainty = re.split(r"(?<!\\)\|", row)[1:-1]
        spec = POLICY_LOSSES[name.strip(" `")]
        expected = [NEEDS_IN_WORDS[need] for need in sorted(spec.needs)]
        expected += ["mini-batch"] * (spec.statistics is not None)
        expected += ["whole groups in it"] * spec.whole_groups
        assert needs.strip() == ", ".join(expected), name
        source = f"[{certainty.strip().partition(',')[0]}]"
        assert name.strip(" `") == "apo_ratio" or source in (spec.function.__doc__ or ""), name


def test_every_loss_is_updated_with_on_several_layouts() -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    on_layouts = "".join(text for text in texts if " check_updates(" in text)
    missing = [n for n, spec in POLICY_LOSSES.items() if spec.uses_rollouts and f'"{n}"' not in on_layouts]
    assert not missing, "METHODS of tests/test_layout_invariance.py takes a loss that needs nothing more"


def test_who_reads_the_shared_clip_is_said() -> None:
    text = re.search(r"of their covariance\. (.*?) read `dual_clip`\.", METHODS_PAGE.read_text(), re.DOTALL)
    assert text is not None
    of_all, of_one = text[1].split(" read `clip_low`, `clip_high` and `dual_clip`; ")
    reads = {name: spec.reads for name, spec in POLICY_LOSSES.items()}
    clip = {"clip_low", "clip_high", "dual_clip"}
    assert set(re.findall(r"`(\w+)`", of_all)) == {name for name, found in reads.items() if found >= clip}
    assert set(re.findall(r"`(\w+)`", of_one)) == {
        name for name, found in reads.items() if found & clip == {"dual_clip"}
    }


def test_a_loss_is_read_at_a_glance() -> None:
    lengths = {n: len(inspect.getsource(spec.function).splitlines()) for n, spec in POLICY_LOSSES.items()}
    assert max(lengths.values()) <= 40, lengths


@pytest.mark.parametrize("name", sorted({*POLICY_LOSSES} - {"apo_ratio", "supervised"}))
def test_sources_and_certainty_are_stated(name: str) -> None:
    assert_certainty_is_stated(name, POLICY_LOSSES[name].function)
