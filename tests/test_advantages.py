"""Advantage estimators and aggregation weights against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import (
    AdvantageInputs,
    estimate_advantages,
    group_normalized_advantages,
    mixed_groups,
    sequence_weights,
)

NAN = math.nan
NAMES = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")  # more in test_advantage_estimators.py


def estimate(name: str, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    cfg = ObjectiveConfig.model_validate({"advantage_estimator": name})
    return estimate_advantages(AdvantageInputs(rewards, lengths, rewards >= 1), cfg)


def random_inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary and real rewards, a group without spread, samples and a whole group without a judgement."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(7, 6, generator=generator, dtype=torch.float64)
    rewards[0] = (rewards[0] > 0.5).double()
    rewards[1] = 0.1
    rewards[2, :2] = NAN
    rewards[3, 1:] = NAN
    rewards[4] = NAN
    rewards[5] = torch.tensor([0.3, 0.3, NAN, 0.3, 0.3, 0.3])
    return rewards, torch.randint(1, 40, (7, 6), generator=generator)


def plain_advantages(name: str, rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    result = np.zeros_like(rewards)
    trained = np.zeros(rewards.shape, bool)
    for i, row in enumerate(rewards):
        judged = row[~np.isnan(row)]
        if len(judged) < 2 or judged.max() - judged.min() <= 1e-6:
            continue
        trained[i] = ~np.isnan(row)
        for j in np.flatnonzero(trained[i]):
            others = np.delete(row, j)
            baseline = np.nanmean(others) if name == "rloo" else judged.mean()
            scale = judged.std(ddof=1) + 1e-6 if name == "grpo" else 1.0
            result[i, j] = (row[j] - baseline) / scale
    if name == "reinforce_plus_plus_baseline":
        tokens = np.repeat(result[trained], lengths[trained])
        result[trained] = (result[trained] - tokens.mean()) / (tokens.std(ddof=1) + 1e-6)
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_estimators_against_numpy(name: str, seed: int) -> None:
    rewards, lengths = random_inputs(seed)
    advantages = estimate(name, rewards, lengths)
    expected = plain_advantages(name, rewards.numpy(), lengths.numpy())
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=1e-12, atol=1e-12)
    no_signal = torch.tensor([1, 3, 4, 5])
    assert (advantages[no_signal] == 0).all() and (advantages[rewards.isnan()] == 0).all()


def test_group_normalisation_by_hand() -> None:
    advantages = group_normalized_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    assert advantages.tolist()[0] == pytest.approx([1.5, -0.5, -0.5, -0.5])  # unbiased std: 1/2
    loose = group_normalized_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.5)
    assert loose.tolist()[0] == pytest.approx([0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("name", NAMES)
def test_groups_without_spread_get_exactly_zero(name: str) -> None:
    # 0.1 is not a binary fraction: the rounding of its mean, over eps, would be an advantage of 1e-3.
    assert (estimate(name, torch.full((3, 7), 0.1), torch.full((3, 7), 5)) == 0).all()


def test_mixed_groups() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [NAN, 1.0], [NAN, NAN], [0.5, 0.5 + 1e-7], [0.5, 0.6]])
    assert mixed_groups(rewards).tolist() == [True, False, False, False, False, True]


def test_whitened_tokens_have_mean_zero_and_unit_std() -> None:
    rewards, lengths = random_inputs()
    advantages = estimate("reinforce_plus_plus_baseline", rewards, lengths)
    trained = mixed_groups(rewards)[:, None] & ~rewards.isnan()
    tokens = advantages[trained].repeat_interleave(lengths[trained])
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert tokens.std().item() == pytest.approx(1.0, rel=1e-5)


LENGTHS = [3, 1, 0, 5]
LOSSES = [[1.0, 2.0, 6.0], [10.0], [], [1.0, 1.0, 2.0, 2.0, 4.0]]
PLAIN = {
    "token-mean": np.mean(sum(LOSSES, [])),
    "seq-mean-token-mean": np.mean([np.mean(x) for x in LOSSES if x]),
    "seq-mean-token-sum-norm": np.mean([np.sum(x) / 8 for x in LOSSES if x]),
}


@pytest.mark.parametrize("mode", list(PLAIN))
def test_weights_give_the_textbook_aggregate(mode: str) -> None:
    weights = sequence_weights(mode, torch.tensor(LENGTHS), 8)  # type: ignore[arg-type]
    assert weights.dtype == torch.float64 and weights[2] == 0
    total = sum(w * sum(losses) for w, losses in zip(weights.tolist(), LOSSES, strict=True))
    assert total == pytest.approx(PLAIN[mode], rel=1e-14)


@pytest.mark.parametrize("mode", list(PLAIN))
def test_weights_of_nothing_are_zero(mode: str) -> None:
    assert sequence_weights(mode, torch.zeros(3, dtype=torch.int64), 8).tolist() == [0.0] * 3  # type: ignore[arg-type]
    assert sequence_weights(mode, torch.zeros(0, dtype=torch.int64), 8).shape == (0,)  # type: ignore[arg-type]
