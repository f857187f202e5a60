"""What is done to the groups of a step: checked, scored, given advantages, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from apo_megatron.config import ObjectiveConfig, RLConfig
from apo_megatron.errors import RolloutError
from apo_megatron.objectives.advantage_registry import (
    ADVANTAGE_ESTIMATORS,
    estimate_advantages,
    teaching_groups,
)
from apo_megatron.objectives.advantages import MIN_SPREAD, AdvantageInputs
from apo_megatron.objectives.registry import POLICY_LOSSES
from apo_megatron.objectives.target_advantages import median_normalized_rewards
from apo_megatron.rewards.interface import TermReward, score_batch
from apo_megatron.rewards.overlong import shaped_rewards
from apo_megatron.rewards.registry import Reward
from apo_megatron.rollout.advantage_state import AdvantageState
from apo_megatron.rollout.engine import SamplingParams
from apo_megatron.rollout.sampling import sampling_params
from apo_megatron.types import Completion, Prompt, SampleGroup, solve_rate

T = TypeVar("T")
_MAX_STEPS = 1_000_003  # prime: seeds of neighbouring runs do not meet
_ROUND_SEEDS = 65_537  # apart in the run's seed: a prompt may come again in a later round of a step


def step_sampling(cfg: RLConfig, step: int, round_number: int = 0) -> SamplingParams:
    """The sampling parameters of a step's round: every one draws from a seed of its own."""
    seed = cfg.train.seed + round_number * _ROUND_SEEDS
    return sampling_params(cfg.rollout, seed=seed * _MAX_STEPS + step)


def check_versions(prompt: Prompt, completions: Sequence[Completion], oldest: int, newest: int) -> None:
    """Raises RolloutError where a token comes from weights outside [oldest, newest]."""
    found = {version for completion in completions for version, _ in completion.versions}
    if any(not oldest <= version <= newest for version in found):
        expected = f"{newest}" if oldest == newest else f"{oldest} to {newest}"
        raise RolloutError(
            f"prompt {prompt.prompt_id!r}: completions of policy versions {sorted(found)}, expected "
            f"{expected}: an engine has other weights than it was given, so this cannot be trained on"
        )


def score_groups(groups: Sequence[SampleGroup], reward: Reward, cfg: ObjectiveConfig) -> None:
    """Fill in the rewards, with their terms where the advantage estimator looks at them; NaN marks a sample
    that could not be judged."""
    prompts = [group.prompt for group in groups]
    completions = [[sample.completion for sample in group.samples] for group in groups]
    if _looks_at_terms(cfg):
        assert isinstance(reward, TermReward), "a rule of the configuration wants several rewards"
        for group, terms in zip(groups, reward.score_terms(prompts, completions), strict=True):
            for sample, values in zip(group.samples, terms, strict=True):
                sample.reward, sample.reward_terms = reward.total(values), values
        return
    for group, rewards in zip(groups, score_batch(reward, prompts, completions), strict=True):
        for sample, value in zip(group.samples, rewards, strict=True):
            sample.reward = value


def is_mixed(group: SampleGroup) -> bool:
    """Whether a scored group has right and wrong answers: the judged rewards differ."""
    judged = [s.reward for s in group.samples if s.reward is not None and s.reward == s.reward]
    return bool(judged) and max(judged) - min(judged) > MIN_SPREAD


def groups_that_teach(groups: Sequence[SampleGroup], cfg: RLConfig) -> list[bool]:
    """Which of some scored groups the advantage estimator can learn from, before rewards are shaped."""
    if not groups:
        return []
    rewards, lengths = _rewards_and_lengths(groups)
    found: list[bool] = teaching_groups(
        _inputs(groups, rewards, rewards, lengths, cfg), cfg.objective
    ).tolist()
    return found


def assign_advantages(
    groups: Sequence[SampleGroup], cfg: RLConfig, state: AdvantageState | None = None
) -> None:
    """Fill in the advantages, from shaped rewards. Samples that are not trained on keep None: those without
    a judgement, and with rollout.mask_truncated those that were cut, whose rewards count in their group.

    ``state`` is what the estimator kept of the steps before, and then what it keeps for the next one.
    """
    rewards, lengths = _rewards_and_lengths(groups)
    shaped = shaped_rewards(rewards, lengths, cfg.reward, cfg.rollout.max_new_tokens)
    is_masked = torch.zeros_like(rewards, dtype=torch.bool)
    if cfg.rollout.mask_truncated:
        cut = [[sample.completion.finish_reason == "length" for sample in g.samples] for g in groups]
        is_masked = torch.from_numpy(np.array(_filled(cut, False)))
    # Length 0: without a weight where the estimator weighs by tokens.
    inputs = _inputs(groups, shaped, rewards, lengths.masked_fill(is_masked, 0), cfg)
    estimator = ADVANTAGE_ESTIMATORS[cfg.objective.advantage_estimator]
    if state is not None:
        inputs = replace(inputs, state=state.values)
    advantages = estimate_advantages(inputs, cfg.objective)
    if state is not None and estimator.next_state is not None:
        state.values = estimator.next_state(inputs, cfg.objective)
    is_trained = ~rewards.isnan() & ~is_masked
    for group, row, trained in zip(groups, advantages.tolist(), is_trained.tolist(), strict=True):
        for sample, advantage, is_on in zip(group.samples, row, trained, strict=False):  # filled up
            sample.advantage = advantage if is_on else None
            sample.is_left_out = is_on and advantage == 0 and not estimator.trains_on_zeros
    if "target_advantages" in POLICY_LOSSES[cfg.objective.loss_mode].needs:
        for group, row in zip(groups, median_normalized_rewards(shaped).tolist(), strict=True):
            for sample, target in zip(group.samples, row, strict=False):
                sample.target_advantage = target


def group_metrics(groups: Sequence[SampleGroup], cfg: RLConfig) -> dict[str, float]:
    """What the samples of a step say: reward (unshaped), mixed groups, lengths, truncation."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [sample.reward for sample in samples if sample.reward == sample.reward]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    mixed = [is_mixed(group) for group in groups]
    solved = [bool(solve_rate([sample.reward for sample in group.samples])) for group in groups]
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    metrics = {
        "reward": sum(r for r in judged if r is not None) / max(1, len(judged)),
        "mixed_group_share": sum(mixed) / len(groups),
        "solved_group_share": sum(solved) / len(groups),
        "response_length": sum(lengths) / len(samples),
        "truncation_rate": sum(truncated) / len(samples),
        "unjudged_share": 1 - len(judged) / len(samples),
        "response_tokens": float(sum(lengths)),
    }
    if cfg.reward.overlong_buffer and judged:
        shaped = shaped_rewards(*_rewards_and_lengths(groups), cfg.reward, cfg.rollout.max_new_tokens)
        metrics["shaped_reward"] = float(shaped.nanmean())
    return metrics


def _inputs(
    groups: Sequence[SampleGroup],
    shaped: torch.Tensor,
    rewards: torch.Tensor,
    lengths: torch.Tensor,
    cfg: RLConfig,
) -> AdvantageInputs:
    """What the estimator may look at; right is what ``rewards`` say, also where they are shaped."""
    names = [group.prompt.prompt_id for group in groups]
    inputs = AdvantageInputs(shaped, lengths, rewards >= 1, prompt_ids=names)
    if not _looks_at_terms(cfg.objective):
        return inputs
    said = [[sample.reward_terms for sample in group.samples] for group in groups]
    terms = np.array(_filled(said, (np.nan,) * len(cfg.reward.rewards)), np.float32)
    weights = torch.tensor([term.weight for term in cfg.reward.rewards])
    return replace(inputs, reward_terms=torch.from_numpy(terms), term_weights=weights)


def _looks_at_terms(cfg: ObjectiveConfig) -> bool:
    return "reward_terms" in ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].needs


def _rewards_and_lengths(groups: Sequence[SampleGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [P, G] fp32, NaN where not judged, and response lengths [P, G] int64 in tokens.

    G is the size of the largest group; the others are filled up with samples of no token, not judged.
    """
    rewards = [[sample.reward for sample in group.samples] for group in groups]
    lengths = [[len(sample.completion.token_ids) for sample in group.samples] for group in groups]
    # Through NumPy: torch looks at nested lists ten times as long.
    return (
        torch.from_numpy(np.array(_filled(rewards, np.nan), np.float32)),
        torch.from_numpy(np.array(_filled(lengths, 0), np.int64)),
    )


def _filled(rows: list[list[T]], value: T) -> list[list[T]]:
    """The rows, the shorter ones filled up with ``value`` at their ends."""
    length = max(len(row) for row in rows)
    return [row + [value] * (length - len(row)) for row in rows]
