"""The metrics of an objective, and what it asks of the actor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import POLICY_LOSSES, MetricSums, build_objective, supervised_objective
from tests.objective_cases import MODES, config, inputs_of, make_case, metric_values, select, token_weights


@pytest.mark.parametrize("mode", [*MODES, "supervised"])
def test_no_token_gives_zero_with_a_graph_and_the_same_metric_names(mode: str) -> None:
    cfg = ObjectiveConfig() if mode == "supervised" else config(mode, "kl")
    objective = supervised_objective() if mode == "supervised" else build_objective(cfg)
    case = make_case()
    inputs = inputs_of(case, cfg)
    nothing = torch.zeros_like(case.targets, dtype=torch.bool)
    loss, metrics = objective(select(inputs, nothing), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0 and torch.equal(case.logits.grad, torch.zeros_like(case.logits))  # type: ignore[arg-type]
    _, some = objective(inputs, token_weights(case, cfg))
    assert metrics.keys() == some.keys()
    layouts = []
    for found in (metrics, some):
        sums = MetricSums()
        sums.add(found)
        layouts.append(sums.flat().shape)
    assert layouts[0] == layouts[1]


def test_metrics_against_plain_sums() -> None:
    case = make_case(0.8, seed=2)
    for exclude in (True, False):
        cfg = ObjectiveConfig(apo_topk=3, apo_exclude_sampled=exclude)
        inputs = inputs_of(case, cfg)
        found = metric_values(case, cfg)
        wrong, probs = case.advantages < 0, case.logits.detach().softmax(-1)
        top = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, case.reference.topk(3).indices, True)
        support = case.support(cfg)
        mass, reference_mass = (probs * support).sum(-1), (case.reference.exp() * support).sum(-1)
        ratio = (inputs.log_probs.detach() - inputs.old_log_probs).exp()
        rectified = 1.05 * ratio - 0.1 * mass / reference_mass
        is_low = (rectified < 0.8) & wrong
        is_high = (ratio > 1.28) & (case.advantages > 0)
        # The unclipped side of each sign occurs, too, so that a metric that forgets the sign is seen.
        assert ((ratio < 0.8) & ~wrong).any() and ((ratio > 1.28) & ~is_high).any()
        reference = case.reference.gather(1, case.targets[:, None])[:, 0] - inputs.log_probs.detach()
        expected = {
            "support_coverage": (probs * top).sum(-1)[wrong].mean(),
            "anchor_mass": mass[wrong].mean(),
            "reference_anchor_mass": reference_mass[wrong].mean(),
            "anchor_ratio": (mass / reference_mass)[wrong].mean(),
            "sampled_in_support": (top & case.is_target).any(-1)[wrong].double().mean(),
            "importance_ratio": ratio.mean(),
            "kl_old": (ratio - 1 - ratio.log()).mean(),
            "kl_reference": (reference.exp() - 1 - reference)[wrong].mean(),
            "clip_fraction_low": is_low.double().mean(),
            "clip_fraction_high": is_high.double().mean(),
            "rectified_clip_fraction": is_low[wrong].double().mean(),
            "wrong_token_fraction": wrong.double().mean(),
            "entropy": inputs.entropy.detach().mean(),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value.item(), rel=1e-9), name
        assert {"anchor_ratio_p05", "anchor_ratio_p50", "reference_anchor_mass_p95"} <= found.keys()
        assert found["importance_ratio_max"] == pytest.approx(ratio.max().item(), rel=0.024)


@pytest.mark.parametrize(
    ("settings", "needs", "scope", "support", "reference_log_probs"),
    [
        ({}, {"anchor"}, "wrong", True, False),
        ({"support_telemetry": False}, {"anchor"}, "wrong", True, False),
        ({"loss_mode": "vanilla"}, set(), "wrong", True, False),
        ({"loss_mode": "vanilla", "support_telemetry": False}, set(), "none", False, False),
        ({"loss_mode": "vanilla", "use_kl_loss": True}, {"reference_log_probs"}, "all", True, True),
        (
            {"loss_mode": "vanilla", "use_kl_loss_on_wrong": True, "support_telemetry": False},
            {"reference_log_probs"},
            "wrong",
            False,
            True,
        ),
        (
            {"use_kl_loss": True, "entropy_coeff": 0.1},
            {"anchor", "reference_log_probs", "entropy_grad"},
            "all",
            True,
            True,
        ),
    ],
)
def test_what_the_actor_has_to_prepare(
    settings: dict[str, Any], needs: set[str], scope: str, support: bool, reference_log_probs: bool
) -> None:
    objective = build_objective(ObjectiveConfig(apo_topk=5, **settings))
    assert objective.needs == needs and objective.reference_scope == scope
    assert objective.needs_support is support and objective.support_size == (5 if support else 0)
    assert objective.needs_reference_log_probs is reference_log_probs


def test_supervised_needs_no_reference_and_every_mode_is_registered() -> None:
    objective = supervised_objective()
    assert objective.needs == frozenset() and objective.reference_scope == "none"
    assert not objective.needs_support and objective.support_size == 0
    modes = ObjectiveConfig.model_fields["loss_mode"].annotation.__args__  # type: ignore[union-attr]
    assert {*modes, "supervised"} == set(POLICY_LOSSES)
