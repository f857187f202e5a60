"""Answers near the length limit: their reward is shaped, or they are masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from apo_megatron.config import ObjectiveConfig, RewardConfig
from apo_megatron.data.collate import trained_sequences
from apo_megatron.objectives import AdvantageInputs, estimate_advantages
from apo_megatron.rewards.overlong import shaped_rewards
from apo_megatron.types import Completion, FinishReason, Prompt, Sample, SampleGroup


@pytest.mark.parametrize(
    ("length", "punishment"),
    [(1, 0.0), (14, 0.0), (15, 0.0), (16, 0.2), (17, 0.4), (19, 0.8), (20, 1.0)],
)
def test_the_punishment_grows_in_the_buffer(length: int, punishment: float) -> None:
    """Buffer: the last 5 of 20 tokens."""
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.full((1, 2), length)
    for penalty in (1.0, 0.5):
        cfg = RewardConfig(overlong_buffer=5, overlong_penalty=penalty)
        found = shaped_rewards(rewards, lengths, cfg, max_new_tokens=20)
        expected = rewards - penalty * punishment
        torch.testing.assert_close(found, expected)


def test_it_is_the_rule_of_dapo() -> None:
    """arXiv 2503.14476 with its own lengths, written in its own way."""
    longest, buffer = 20480, 4096
    lengths = torch.arange(0, longest + 1, 7).unsqueeze(0)
    found = shaped_rewards(
        torch.zeros(lengths.shape, dtype=torch.float64),
        lengths,
        RewardConfig(overlong_buffer=buffer),
        longest,
    )
    y = lengths.numpy()
    expected = np.where(y <= longest - buffer, 0.0, ((longest - buffer) - y) / buffer)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_without_a_buffer_rewards_are_the_same_tensor() -> None:
    rewards = torch.tensor([[1.0, math.nan]])
    assert shaped_rewards(rewards, torch.tensor([[20, 20]]), RewardConfig(), 20) is rewards


def test_what_could_not_be_judged_stays_so() -> None:
    shaped = shaped_rewards(
        torch.tensor([[math.nan, 1.0]]), torch.tensor([[20, 20]]), RewardConfig(overlong_buffer=5), 20
    )
    assert shaped[0, 0].isnan() and shaped[0, 1] == 0.0


def sample(length: int, advantage: float | None, finish_reason: FinishReason = "stop") -> Sample:
    completion = Completion(
        np.arange(length, dtype=np.int32), np.zeros(length, np.float32), "", finish_reason, ((0, length),)
    )
    return Sample(completion, reward=0.0, advantage=advantage)


def test_masked_samples_are_not_trained() -> None:
    prompt = Prompt("p", "", np.array([7, 8], dtype=np.int32))
    masked = sample(4, None, "length")
    trained = trained_sequences(
        [
            SampleGroup(prompt, [sample(1, 0.5), masked, sample(2, -0.5), sample(3, 0.0)]),
            SampleGroup(prompt, [masked, masked]),
            SampleGroup(prompt, [masked, sample(1, 0.0)]),  # what is left has nothing to say
        ]
    )
    assert [(len(s.token_ids) - s.prompt_length, s.advantage) for s in trained] == [
        (1, 0.5),
        (2, -0.5),
        (3, 0.0),
    ]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline", "pkpo"])
def test_a_masked_sample_counts_in_the_baseline(estimator: str) -> None:
    """Its advantage is taken away afterwards; length 0 keeps it out of means over trained tokens."""
    rewards, lengths = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).double(), torch.tensor([[3, 4, 0, 5]])
    kept = [0, 1, 3]
    cfg = ObjectiveConfig.model_validate({"advantage_estimator": estimator, "pkpo": {"k": 2}})
    found = estimate_advantages(AdvantageInputs(rewards, lengths, rewards >= 1), cfg)[0, kept]
    rewards, some_lengths = rewards[:, kept], lengths[:, kept]
    without = estimate_advantages(AdvantageInputs(rewards, some_lengths, rewards >= 1), cfg)[0]
    if estimator == "reinforce_plus_plus_baseline":  # one group: its mean is that of the batch
        assert (found * lengths[0, kept]).sum().item() == pytest.approx(0.0, abs=1e-9)
    else:
        assert not torch.allclose(found, without)
