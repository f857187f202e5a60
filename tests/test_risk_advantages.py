"""RiskPO: bundles in plain loops, float64, and quantiles that are followed from step to step."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.config.advantages import RiskPOConfig
from apo_megatron.objectives import ADVANTAGE_ESTIMATORS, AdvantageInputs, estimate_advantages
from apo_megatron.objectives.risk_advantages import quantiles_of, riskpo_advantages, track_quantiles

NAN = math.nan
CFG = RiskPOConfig(bundle_size=3, low_level=0.25, high_level=0.75, cvar_weight=2.0, tracking_rate=0.3)


def random_rewards(seed: int, num_prompts: int = 12, group_size: int = 6) -> Tensor:
    """Right and wrong, graded ones, groups that are all alike, a bundle that is, and some not judged."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(num_prompts, group_size, generator=generator, dtype=torch.float64)
    rewards[::2] = rewards[::2].round()
    rewards[1] = 1.0
    rewards[6:9] = 0.0
    rewards[4, 2] = rewards[5, 2] = rewards[10, 0] = NAN
    return rewards


def plain_scores(rewards: np.ndarray, size: int) -> list[list[float]]:
    """Of each bundle: the sum of the g-th answers for every g."""
    bundles = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    return [[float(sum(answers)) for answers in zip(*bundle, strict=True)] for bundle in bundles]


def plain_riskpo(rewards: np.ndarray, cfg: RiskPOConfig, q_low: float, q_high: float) -> np.ndarray:
    found = np.zeros(rewards.shape)
    for number, scores in enumerate(plain_scores(rewards, cfg.bundle_size)):
        judged = [s for s in scores if not math.isnan(s)]
        if max(judged) - min(judged) <= 1e-6:
            continue
        for g, s in enumerate(scores):
            if math.isnan(s):
                continue
            rvar = max(s - q_low, 0) - max(s - q_high, 0) + q_low - q_high
            cvar = -max(q_low - s, 0)
            risk = cfg.cvar_weight * cvar / cfg.low_level + rvar / (cfg.high_level - cfg.low_level)
            risk /= (cfg.cvar_weight + 1) * (statistics.stdev(judged) + 1e-6)
            for row in range(number * cfg.bundle_size, (number + 1) * cfg.bundle_size):
                spread = statistics.stdev(r for r in rewards[row] if not math.isnan(r))
                found[row, g] = risk / (spread if spread > 1e-3 else 1.0)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tracked", [None, {"low": 0.8, "high": 1.7}, {"low": -1.0, "high": 9.0}])
def test_advantages_against_the_definition(seed: int, tracked: dict[str, float] | None) -> None:
    rewards = random_rewards(seed)
    known = [s for of_bundle in plain_scores(rewards.numpy(), 3) for s in of_bundle if not math.isnan(s)]
    low, high = np.quantile(known, [0.25, 0.75]) if tracked is None else tracked.values()
    found = riskpo_advantages(rewards, CFG, tracked)
    np.testing.assert_allclose(
        found.numpy(), plain_riskpo(rewards.numpy(), CFG, low, high), rtol=1e-11, atol=1e-12
    )
    assert (found <= 0).all() and found.ne(0).any() and (found[6:9] == 0).all()
    assert (found[3:6, 2] == 0).all()  # an attempt with an answer that was not judged
    single = riskpo_advantages(rewards.float(), CFG, tracked)
    torch.testing.assert_close(single, found.float(), rtol=1e-4, atol=1e-5)


def test_an_attempt_by_hand() -> None:
    """Two prompts, three answers; q from 0 to 2, so that l = 0.5 takes the median and u = 1 is no level."""
    cfg = RiskPOConfig(bundle_size=2, low_level=0.5, high_level=0.75, cvar_weight=1.0)
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=torch.float64)  # scores 2, 1, 0: std 1
    found = riskpo_advantages(rewards, cfg, {"low": 1.0, "high": 2.0})
    # s = 1: between -1 / 0.25, below 0; s = 0: the same and -1 / 0.5; half of each sum, over 1 and 3^-1/2.
    expected = torch.tensor([0.0, -2.0, -3.0], dtype=torch.float64) * 3**0.5 / (1 + 1e-6)
    torch.testing.assert_close(found, expected.expand(2, 3), rtol=1e-12, atol=0)


def test_quantiles_move_towards_their_levels() -> None:
    rewards = random_rewards(0)
    scores = [s for of_bundle in plain_scores(rewards.numpy(), 3) for s in of_bundle if not math.isnan(s)]
    first = track_quantiles(rewards, CFG, None)
    assert first == quantiles_of(rewards, CFG) == track_quantiles(rewards, CFG, {})
    assert list(first.values()) == pytest.approx(np.quantile(scores, [0.25, 0.75]).tolist(), rel=1e-14)
    found = track_quantiles(rewards, CFG, {"low": 1.0, "high": 2.0})
    for name, level, q in (("low", 0.25, 1.0), ("high", 0.75, 2.0)):
        below = sum(s < q for s in scores) / len(scores)
        assert found[name] == pytest.approx(q + 0.3 * (level - below), rel=1e-14)
    nobody = torch.full((3, 4), NAN)
    assert track_quantiles(nobody, CFG, found) == found and track_quantiles(nobody, CFG, None) == {}
    assert (riskpo_advantages(nobody, CFG, None) == 0).all()


def test_they_find_the_quantiles_of_scores_that_stay_as_they_are() -> None:
    cfg = RiskPOConfig(bundle_size=4, tracking_rate=0.1)
    generator = torch.Generator().manual_seed(1)
    state: dict[str, float] = {"low": 3.5, "high": 3.6}
    for _ in range(300):
        rewards = torch.rand(32, 16, generator=generator, dtype=torch.float64)
        state = track_quantiles(rewards, cfg, state)
    scores = torch.rand(4, 100_000, generator=generator, dtype=torch.float64).sum(dim=0)
    for name, level in (("low", 0.2), ("high", 0.9)):
        assert abs(state[name] - float(scores.quantile(level))) < 0.05


def test_the_registry_hands_the_state_on() -> None:
    spec = ADVANTAGE_ESTIMATORS["riskpo"]
    assert spec.next_state is not None and spec.looks_beyond_group
    cfg = ObjectiveConfig.model_validate({"advantage_estimator": "riskpo", "riskpo": CFG.model_dump()})
    rewards = random_rewards(2)
    none = torch.zeros(rewards.shape, dtype=torch.int64)
    first = AdvantageInputs(rewards, none, none.bool())
    second = replace(first, state=spec.next_state(first, cfg))
    torch.testing.assert_close(estimate_advantages(second, cfg), estimate_advantages(first, cfg))
    third = replace(second, state=spec.next_state(second, cfg))
    assert third.state != second.state
    assert not torch.equal(estimate_advantages(third, cfg), estimate_advantages(first, cfg))
    # Through a checkpoint to the bit.
    assert json.loads(json.dumps(third.state)) == third.state
    text = riskpo_advantages.__doc__ or ""
    assert "arXiv" in text and "[code]" in text and "Experimental" in text


def test_a_step_of_incomplete_bundles_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="whole bundles"):
        riskpo_advantages(torch.zeros(4, 2), CFG, None)
