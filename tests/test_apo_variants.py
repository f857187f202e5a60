"""The variants of APO in float64: the definition of each, what it reduces to, how coefficients move."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import MetricSums, MovingObjective, build_objective
from apo_megatron.objectives.moving_coefficients import anchor_mass_ratio
from tests.objective_cases import Case, inputs_of, make_case, token_weights


def config(**settings: Any) -> ObjectiveConfig:
    variants = {name: settings.pop(name) for name in list(settings) if name in _VARIANTS}
    return ObjectiveConfig(**{"apo_topk": 3, "apo_variants": variants, **settings})


_VARIANTS = ObjectiveConfig().apo_variants.model_dump()


def loss_of(cfg: ObjectiveConfig, case: Case) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss, its gradient with respect to the logits, and the metrics."""
    loss, metrics = build_objective(cfg)(inputs_of(case, cfg), token_weights(case, cfg))
    sums = MetricSums()
    sums.add(metrics)
    return loss.detach(), torch.autograd.grad(loss, case.logits)[0], sums.finalize()


# --- detach_pull ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dual_clip": 1.3}, {"clip_low": 0.1, "clip_high": 0.05}])
@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
def test_a_detached_pull_only_decides_what_is_clipped(distance: float, settings: dict[str, Any]) -> None:
    """The loss is that of APO; the gradient has no d log P, by the definition and token by token."""
    case, cfg = make_case(distance), config(detach_pull=True, **settings)
    found, gradient, metrics = loss_of(cfg, case)
    of_apo, with_pull, apo_metrics = loss_of(config(**settings), case)
    assert torch.equal(found, of_apo) and not torch.equal(gradient, with_pull)
    assert metrics.pop("pull_fraction") == 0.0 < apo_metrics.pop("pull_fraction")
    assert metrics == apo_metrics

    probs, reference, support = case.logits.softmax(-1), case.reference.exp(), case.support(cfg)
    weights, expected = token_weights(case, cfg), torch.zeros((), dtype=torch.float64)
    for t, y in enumerate(case.targets.tolist()):
        a, ratio = case.advantages[t].item(), probs[t, y] / case.old_log_probs[t].exp()
        if a >= 0:
            slope = a if ratio <= 1 + cfg.clip_high else 0.0
        else:
            anchor = (probs[t, support[t]].sum() / reference[t, support[t]].sum()).item()
            rectified = cfg.apo_push_coeff * ratio.item() - cfg.apo_pull_coeff * anchor
            is_open = 1 - cfg.clip_low <= rectified <= (cfg.dual_clip or math.inf)
            slope = a * cfg.apo_push_coeff if is_open else 0.0
        expected = expected - weights[t] * slope * ratio
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected, case.logits)[0], rtol=1e-11, atol=1e-13
    )


def test_without_a_pull_there_is_nothing_to_detach() -> None:
    plain, detached = ({"apo_pull_coeff": 0.0, "detach_pull": value} for value in (False, True))
    one, other = (loss_of(config(**settings), make_case()) for settings in (plain, detached))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


# --- schedules ------------------------------------------------------------------------------------


def coefficients(moving: MovingObjective, step: int) -> tuple[float, float]:
    cfg = moving.at(step).cfg
    return cfg.apo_push_coeff, cfg.apo_pull_coeff


def test_a_schedule_is_a_straight_line_and_then_its_end() -> None:
    cfg = config(final_push_coeff=1.01, final_pull_coeff=0.02, schedule_steps=4)
    moving = MovingObjective(build_objective(cfg))
    expected = [(1.05, 0.1), (1.04, 0.08), (1.03, 0.06), (1.02, 0.04), (1.01, 0.02), (1.01, 0.02)]
    for step, values in enumerate(expected):
        assert coefficients(moving, step) == pytest.approx(values, rel=1e-14)
        assert moving.finish_step(step, {}) == dict(
            zip(("apo/push_coeff", "apo/pull_coeff"), coefficients(moving, step), strict=True)
        )
    assert coefficients(moving, 4) == coefficients(moving, 10**9) == (1.01, 0.02)  # exactly
    assert coefficients(moving, 0) == (1.05, 0.1)
    # A run that goes on needs nothing but the number of the step.
    assert not moving.is_stateful
    assert coefficients(MovingObjective(build_objective(cfg)), 3) == coefficients(moving, 3)


@pytest.mark.parametrize("final", [{"final_push_coeff": 1.0}, {"final_pull_coeff": 0.0}])
def test_one_coefficient_may_move_alone(final: dict[str, float]) -> None:
    push, pull = coefficients(MovingObjective(build_objective(config(**final, schedule_steps=2))), 1)
    assert (push, pull) == pytest.approx((1.025, 0.1) if "final_push_coeff" in final else (1.05, 0.05))


def test_the_loss_of_a_step_is_that_of_its_coefficients() -> None:
    case, cfg = make_case(), config(final_push_coeff=1.0, final_pull_coeff=0.0, schedule_steps=10)
    moving = MovingObjective(build_objective(cfg))
    for step, settings in ((0, {}), (5, {"apo_push_coeff": 1.025, "apo_pull_coeff": 0.05})):
        found, _ = moving.at(step)(inputs_of(case, cfg), token_weights(case, cfg))
        torch.testing.assert_close(found, loss_of(config(**settings), case)[0], rtol=1e-14, atol=0)
    found, _ = moving.at(10)(inputs_of(case, cfg), token_weights(case, cfg))
    assert torch.equal(found, loss_of(config(loss_mode="vanilla"), case)[0])


def test_by_default_nothing_moves_and_nothing_is_logged() -> None:
    for settings in ({}, {"loss_mode": "vanilla"}, {"detach_pull": True}):
        objective = build_objective(config(**settings))
        moving = MovingObjective(objective)
        assert moving.at(7) is objective and not moving.is_stateful
        assert moving.finish_step(7, {"anchor_mass": 0.1, "reference_anchor_mass": 0.2}) == {}
        assert moving.at(8) is objective
        assert objective.support_mass is objective.reference_decay is None


# --- an adapted pull ------------------------------------------------------------------------------


def adaptive(**settings: Any) -> MovingObjective:
    return MovingObjective(build_objective(config(**{"target_anchor_ratio": 0.8, **settings})))


def measured(ratio: float) -> dict[str, float]:
    return {"anchor_mass": 0.3 * ratio, "reference_anchor_mass": 0.3, "anchor_ratio": 1e6}


def test_the_pull_follows_the_anchor_mass() -> None:
    moving, pull = adaptive(), 0.1
    for step, ratio in enumerate((0.6, 0.8, 1.0, 0.5)):
        found = moving.finish_step(step, measured(ratio))
        assert found["apo/pull_coeff"] == pytest.approx(pull, rel=1e-14)  # what the step was trained with
        assert found["apo/anchor_mass_ratio"] == pytest.approx(ratio, rel=1e-14)
        pull *= math.exp(0.1 * (0.8 - ratio) / 0.8)
        assert coefficients(moving, step + 1) == pytest.approx((1.05, pull), rel=1e-14)
    assert pull > 0.1


@pytest.mark.parametrize(("ratio", "bound"), [(0.0, 0.12), (50.0, 0.05), (1e300, 0.05)])
def test_the_pull_stays_within_its_bounds(ratio: float, bound: float) -> None:
    moving = adaptive(adaptation_rate=1.0, min_pull_coeff=0.05, max_pull_coeff=0.12)
    moving.finish_step(0, measured(ratio))
    assert coefficients(moving, 1) == (1.05, bound)


@pytest.mark.parametrize(
    "metrics",
    [{}, {"reward": 1.0}, {"anchor_mass": 0.0, "reference_anchor_mass": 0.0}, {"anchor_mass": math.nan}],
)
def test_a_step_that_measures_nothing_leaves_the_pull(metrics: dict[str, float]) -> None:
    moving = adaptive()
    assert moving.finish_step(0, metrics) == {"apo/push_coeff": 1.05, "apo/pull_coeff": 0.1}
    assert coefficients(moving, 1) == (1.05, 0.1)


def test_the_adapted_pull_is_restored_to_the_bit() -> None:
    whole = adaptive(final_push_coeff=1.02, schedule_steps=7)
    ratios = [0.61, 0.93, 0.333, 0.8, 1.7, 0.1]
    for step, ratio in enumerate(ratios[:3]):
        whole.finish_step(step, measured(ratio))
    resumed = adaptive(final_push_coeff=1.02, schedule_steps=7)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for step, ratio in enumerate(ratios[3:], start=3):
        assert coefficients(resumed, step) == coefficients(whole, step) != (1.05, 0.1)
        assert resumed.finish_step(step, measured(ratio)) == whole.finish_step(step, measured(ratio))
    with pytest.raises(KeyError):
        resumed.load_state_dict({})


def test_what_is_measured_is_the_ratio_of_the_masses() -> None:
    """Each token weighted by its Z; one token with a tiny Z does not rule it, as it does the mean of a."""
    case, cfg = make_case(), config()
    metrics = loss_of(cfg, case)[2]
    wrong, support = case.advantages < 0, case.support(cfg)
    mass = (case.logits.detach().softmax(-1) * support).sum(-1)[wrong]
    reference = (case.reference.exp() * support).sum(-1)[wrong]
    expected = (mass / reference * reference).sum() / reference.sum()
    assert anchor_mass_ratio(metrics) == pytest.approx(expected.item(), rel=1e-12)


# --- what the configuration refuses ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"final_pull_coeff": 0.25, "schedule_steps": 3}, True),  # 0.8, the boundary
        ({"final_pull_coeff": 0.24, "schedule_steps": 3}, False),
        ({"final_push_coeff": 1.38, "schedule_steps": 3}, True),
        ({"final_push_coeff": 1.3, "final_pull_coeff": 0.45, "schedule_steps": 3}, False),  # both at once
        ({"apo_pull_coeff": 0.3, "final_pull_coeff": 0.1, "schedule_steps": 3}, True),  # the start
        ({"target_anchor_ratio": 1.0, "max_pull_coeff": 0.26}, True),
        ({"target_anchor_ratio": 1.0, "max_pull_coeff": 0.24}, False),
        # Each is inside where it starts; the pull may reach its bound when the push has reached its end.
        ({"target_anchor_ratio": 1.0, "final_push_coeff": 0.95, "schedule_steps": 3}, True),
    ],
)
def test_no_coefficients_on_the_way_clip_every_wrong_token(
    settings: dict[str, Any], is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(ValueError, match="every wrong token would start clipped"):
            config(**settings)
    else:
        config(**settings)


@pytest.mark.parametrize(
    "variant",
    [{"detach_pull": True}, {"support_mass": 0.9}, {"reference_decay": 0.9}, {"target_anchor_ratio": 1.0}],
)
def test_other_losses_have_no_variants(variant: dict[str, Any]) -> None:
    config(**variant)
    with pytest.raises(ValueError, match=next(iter(variant)) + ".*leave apo_variants out"):
        config(loss_mode="vanilla", **variant)
    assert config(loss_mode="vanilla", **{name: _VARIANTS[name] for name in variant})
