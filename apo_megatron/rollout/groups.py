"""From prompts to scored groups with advantages: the data half of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apo_megatron.config.schema import ObjectiveConfig, RLConfig
from apo_megatron.errors import RolloutError
from apo_megatron.objectives.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rewards.registry import Reward
from apo_megatron.rollout.engine import Progress, RolloutEngine, SamplingParams
from apo_megatron.rollout.sampling import sampling_params
from apo_megatron.types import Prompt, Sample, SampleGroup


def step_sampling(cfg: RLConfig, step: int) -> SamplingParams:
    """The sampling parameters of ``step``: every step draws from a seed of its own."""
    return sampling_params(cfg.rollout, seed=cfg.train.seed * 1_000_003 + step)


def sample_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    parallel: ParallelContext,
    progress: Progress | None = None,
) -> list[SampleGroup]:
    """The groups of this rank's share of ``prompts`` (every rank passes the same prompts).

    Raises RolloutError where a completion comes from other weights than the engine was given last.
    """
    mine = prompts[parallel.rank :: parallel.world]
    groups = []
    for prompt, completions in zip(mine, engine.generate(mine, sampling, progress), strict=True):
        versions = {completion.policy_version for completion in completions}
        if versions != {engine.policy_version}:
            raise RolloutError(
                f"prompt {prompt.prompt_id}: completions of policy versions {sorted(versions)}, expected "
                f"{engine.policy_version}"
            )
        groups.append(SampleGroup(prompt, [Sample(completion) for completion in completions]))
    return groups


def score_groups(groups: Sequence[SampleGroup], reward: Reward) -> None:
    """Fill in the rewards; NaN marks a sample that could not be judged."""
    for group in groups:
        rewards = reward.score(group.prompt, [sample.completion for sample in group.samples])
        for sample, value in zip(group.samples, rewards, strict=True):
            sample.reward = value


def gather_groups(
    groups: Sequence[SampleGroup], prompts: Sequence[Prompt], parallel: ParallelContext
) -> list[SampleGroup]:
    """The groups of all ranks in the order of ``prompts``, on every rank.

    Advantages and mini-batches need the whole batch; token ids and log-probs are 8 bytes a token.
    """
    shares = all_gather_objects([group.samples for group in groups], parallel)
    return [
        SampleGroup(prompt, shares[i % parallel.world][i // parallel.world])
        for i, prompt in enumerate(prompts)
    ]


def assign_advantages(groups: Sequence[SampleGroup], objective: ObjectiveConfig) -> None:
    """Fill in the advantages; samples without a judgement keep None."""
    rewards = torch.tensor([[sample.reward for sample in group.samples] for group in groups])
    lengths = torch.tensor(
        [[len(sample.completion.token_ids) for sample in group.samples] for group in groups]
    )
    estimator = ADVANTAGE_ESTIMATORS[objective.advantage_estimator]
    advantages = estimator(AdvantageInputs(rewards, lengths))
    for group, row, judged in zip(groups, advantages.tolist(), (~rewards.isnan()).tolist(), strict=True):
        for sample, advantage, is_judged in zip(group.samples, row, judged, strict=True):
            sample.advantage = advantage if is_judged else None


def group_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """What the samples of a step say: reward, mixed groups, lengths, truncation."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [sample.reward for sample in samples if sample.reward == sample.reward]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    mixed = [any(sample.advantage for sample in group.samples) for group in groups]
    solved = [any(sample.reward == 1.0 for sample in group.samples) for group in groups]
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    return {
        "reward": sum(r for r in judged if r is not None) / max(1, len(judged)),
        "mixed_group_share": sum(mixed) / len(groups),
        "solved_group_share": sum(solved) / len(groups),
        "response_length": sum(lengths) / len(samples),
        "truncation_rate": sum(truncated) / len(samples),
        "unjudged_share": 1 - len(judged) / len(samples),
        "response_tokens": float(sum(lengths)),
    }
