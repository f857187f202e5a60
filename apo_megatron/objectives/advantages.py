"""From the rewards of groups to one advantage per sample (the same for all its tokens).

P prompts, G samples each. Three rules hold for every estimator: a NaN reward marks a sample that could not
be judged, which is left out of all statistics and gets advantage 0; a group whose rewards do not differ
gets exactly 0, whatever rounding its mean has; the result is finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Rewards closer than this are equal: the rounding of a mean must not become an advantage.
MIN_SPREAD = 1e-6


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may look at: the groups of a whole step, over all ranks."""

    rewards: Tensor  # [P, G] float; NaN = not judged
    lengths: Tensor  # [P, G] int, response tokens that are trained on: 0 for a sample that is masked


AdvantageEstimator = Callable[[AdvantageInputs], Tensor]


def mixed_groups(rewards: Tensor) -> Tensor:
    """Groups that can be learned from, [P, G] -> [P] bool: the judged rewards span more than 1e-6."""
    is_judged = ~rewards.isnan()
    highest = torch.where(is_judged, rewards, -torch.inf).amax(dim=1)
    lowest = torch.where(is_judged, rewards, torch.inf).amin(dim=1)
    return highest - lowest > MIN_SPREAD  # -inf where nothing was judged


def group_normalized_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """GRPO (arXiv 2402.03300): A = (R - mean) / (std + eps) within each group, [P, G] -> [P, G].

    std is the unbiased one (divisor n - 1, torch's default), as in most trainers.
    """
    centered, num_judged = _centered(rewards)
    variance = centered.square().sum(dim=1, keepdim=True) / (num_judged - 1).clamp(min=1)
    return centered / (variance.sqrt() + eps)


def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """Dr.GRPO (arXiv 2503.20783): A = R - mean, [P, G] -> [P, G]; no weight on easy and hard prompts."""
    return _centered(rewards)[0]


def rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): A = R - mean of the *other* samples = n / (n - 1) * (R - mean), [P, G]."""
    centered, num_judged = _centered(rewards)
    return centered * num_judged / (num_judged - 1).clamp(min=1)


def reinforce_plus_plus_baseline_advantages(rewards: Tensor, lengths: Tensor, eps: float = 1e-6) -> Tensor:
    """REINFORCE++ with group baseline (arXiv 2501.03262): R - mean, then whitened over the batch's tokens.

    [P, G], [P, G] -> [P, G]. Each sample counts with its length in the batch's mean and (unbiased) std.
    Only tokens that are trained on take part, those of judged samples in mixed groups.
    """
    centered, _ = _centered(rewards)
    is_trained = mixed_groups(rewards).unsqueeze(1) & ~rewards.isnan()
    num_tokens = torch.where(is_trained, lengths, 0).to(rewards.dtype)
    total = num_tokens.sum()
    deviation = centered - (num_tokens * centered).sum() / total.clamp(min=1)
    variance = (num_tokens * deviation.square()).sum() / (total - 1).clamp(min=1)
    return torch.where(is_trained, deviation / (variance.sqrt() + eps), 0.0)


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": lambda inputs: group_normalized_advantages(inputs.rewards),
    "dr_grpo": lambda inputs: dr_grpo_advantages(inputs.rewards),
    "rloo": lambda inputs: rloo_advantages(inputs.rewards),
    "reinforce_plus_plus_baseline": lambda inputs: reinforce_plus_plus_baseline_advantages(
        inputs.rewards, inputs.lengths
    ),
}


def _centered(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """R - mean of the judged samples [P, G], 0 where there is nothing to learn; their number [P, 1]."""
    is_judged = ~rewards.isnan()
    num_judged = is_judged.sum(dim=1, keepdim=True)
    mean = torch.where(is_judged, rewards, 0.0).sum(dim=1, keepdim=True) / num_judged.clamp(min=1)
    is_trained = mixed_groups(rewards).unsqueeze(1) & is_judged
    return torch.where(is_trained, rewards - mean, 0.0), num_judged
