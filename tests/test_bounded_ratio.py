"""GBPO: its second signal and its loss, in float64 against their definitions."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import POLICY_LOSSES, LossInputs, LossOutputs, build_objective
from apo_megatron.objectives.target_advantages import median_normalized_rewards
from tests.objective_cases import shares
from tests.plain_bounded_ratio import plain_gbpo
from tests.test_policy_losses import inputs_of, tokens

NAN = math.nan
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "uneven": {"clip_low": 0.05, "clip_high": 0.4, "temperature": 0.3},
}


def with_targets(inputs: LossInputs, seed: int = 7) -> LossInputs:
    """As ``inputs``, with z from -3 to 3 and every third one 0."""
    z = torch.randn(len(inputs.advantages), generator=torch.Generator().manual_seed(seed)).double() * 1.5
    z[::3] = 0.0
    return replace(inputs, target_advantages=z.to(inputs.advantages.dtype))


def evaluate(inputs: LossInputs, own: dict[str, Any]) -> tuple[Tensor, Tensor, LossOutputs]:
    outputs = POLICY_LOSSES["gbpo"].function(
        inputs, ObjectiveConfig.model_validate({"loss_mode": "gbpo", "gbpo": own})
    )
    (slopes,) = torch.autograd.grad(outputs.loss.sum(), inputs.log_probs)
    return outputs.loss.detach(), slopes, outputs


def own_settings(own: dict[str, Any]) -> dict[str, Any]:
    return ObjectiveConfig.model_validate({"loss_mode": "gbpo", "gbpo": own}).gbpo.model_dump()


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("distance", [0.0, 0.05, 0.5, 3.0])
def test_value_and_gradient_are_those_of_the_definition(distance: float, setting: str) -> None:
    inputs = with_targets(tokens(distance))
    assert inputs.target_advantages is not None
    found, slopes, _ = evaluate(inputs, SETTINGS[setting])
    plain = plain_gbpo(
        inputs.log_probs,
        inputs.old_log_probs,
        inputs.advantages,
        inputs.target_advantages,
        own_settings(SETTINGS[setting]),
    )
    torch.testing.assert_close(found, plain.detach(), rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(plain.sum(), inputs.log_probs)[0]
    torch.testing.assert_close(slopes, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_at_the_old_policy_the_gradient_has_the_size_of_the_advantage(setting: str) -> None:
    inputs = with_targets(tokens(0.0))
    own = own_settings(SETTINGS[setting])
    assert inputs.target_advantages is not None
    share = torch.sigmoid(inputs.target_advantages / own["temperature"])
    way = (own["clip_high"] * share - own["clip_low"] * (1 - share)).sign()
    if setting == "defaults":
        assert (way[::3] == 0).all()  # z = 0: at its target, and only there
        way[1::3] = inputs.target_advantages[1::3].sign()
    slopes = evaluate(inputs, SETTINGS[setting])[1]
    torch.testing.assert_close(slopes, -inputs.advantages.abs() * way, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_at_its_target_is_pushed_neither_way(dtype: torch.dtype) -> None:
    one = torch.full((3,), -1.0, dtype=dtype)
    inputs = replace(
        inputs_of(one.clone(), one, torch.tensor([1.0, -1.0, 2.0], dtype=dtype)),
        target_advantages=torch.zeros(3, dtype=dtype),
    )
    found, slopes, _ = evaluate(inputs, {"clip_low": 0.3, "clip_high": 0.3})
    assert (found == 0).all() and (slopes == 0).all()
    # Far from the median the target is an end of the range; the smaller the temperature, the sooner.
    far = replace(inputs, target_advantages=torch.tensor([0.5, -0.5, 100.0], dtype=dtype))
    found, slopes, _ = evaluate(far, {"clip_low": 0.1, "clip_high": 0.2, "temperature": 0.01})
    torch.testing.assert_close(found, torch.tensor([0.2, 0.1, 0.4], dtype=dtype))
    assert slopes.sign().tolist() == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite_and_no_token_has_no_loss(dtype: torch.dtype) -> None:
    logs = torch.tensor([0.0, -19.0, -21.0, -1000.0], dtype=dtype)
    signs = torch.tensor([-2.0, 0.0, 2.0], dtype=dtype)
    log_probs, old, advantages, z = torch.cartesian_prod(logs, logs, signs, 1e30 * signs).unbind(1)
    inputs = replace(inputs_of(log_probs.clone(), old, advantages), target_advantages=z)
    found, slopes, outputs = evaluate(inputs, {})
    assert found.isfinite().all() and slopes.isfinite().all() and found.dtype == dtype
    assert (found[advantages == 0] == 0).all() and (slopes[advantages == 0] == 0).all()
    found, slopes, none = evaluate(with_targets(tokens(0.5, num_tokens=0)), {})
    assert found.shape == slopes.shape == (0,) and none.metrics.keys() == outputs.metrics.keys()


def test_its_metric_is_the_distance_to_the_targets() -> None:
    inputs = with_targets(tokens(0.5))
    found, _, outputs = evaluate(inputs, {})
    expected = found[inputs.advantages != 0] / inputs.advantages[inputs.advantages != 0].abs()
    measured = torch.where(inputs.advantages == 0, 0.0, outputs.metrics["target_distance"].values)
    torch.testing.assert_close(measured[inputs.advantages != 0], expected)
    assert shares(outputs).keys() == {"target_distance"}


def test_the_need_is_declared() -> None:
    assert build_objective(ObjectiveConfig(loss_mode="gbpo")).needs == {"target_advantages"}
    text = POLICY_LOSSES["gbpo"].function.__doc__ or ""
    assert "arXiv" in text and "[code]" in text


# --- the second signal -----------------------------------------------------------------------------


def test_distance_from_the_median_against_plain_numbers() -> None:
    rewards = torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[::2] = rewards[::2].round()
    rewards[3, :2] = rewards[5] = NAN
    rewards[7, 1:] = NAN
    rewards[9] = 0.3
    found = median_normalized_rewards(rewards)
    for row, of_group in zip(rewards.tolist(), found.tolist(), strict=True):
        judged = [value for value in row if not math.isnan(value)]
        for value, z in zip(row, of_group, strict=True):
            if math.isnan(value) or len(judged) < 2 or max(judged) == min(judged):
                assert z == 0.0
            else:
                spread = statistics.stdev(judged) + 1e-6
                assert z == pytest.approx((value - statistics.median(judged)) / spread, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, -2.0]), ([1.0, 0.0], [0.5**0.5, -(0.5**0.5)])],
)
def test_of_right_and_wrong_the_majority_is_the_median(rewards: list[float], expected: list[float]) -> None:
    assert median_normalized_rewards(torch.tensor([rewards]))[0].tolist() == pytest.approx(expected, rel=1e-5)
