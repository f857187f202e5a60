"""From the rewards of groups to one advantage per sample (the same for all its tokens).

P prompts, G samples each. Three rules hold for every estimator: a NaN reward marks a sample that could not
be judged, which is left out of all statistics and gets advantage 0; a group whose rewards do not differ
gets exactly 0, whatever rounding its mean has (but for estimators that say so in the registry: they have no
baseline); the result is finite. A group with advantage 0 everywhere teaches nothing and is not trained on.

Those on Pass@k are in ``pass_at_k_advantages.py``, those of several rewards in ``reward_term_advantages.py``,
all of them in ``advantage_registry.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rewards closer than this are equal: the rounding of a mean must not become an advantage.
MIN_SPREAD = 1e-6


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may look at: the groups of a whole step, over all ranks."""

    rewards: Tensor  # [P, G] float; NaN = not judged
    lengths: Tensor  # [P, G] int, response tokens that are trained on: 0 for a sample that is masked
    is_correct: Tensor  # [P, G] bool; false where not judged. Rewards may be shaped, this is not
    reward_terms: Tensor | None = None  # [P, G, R] float, one for each reward; NaN where one was not judged
    term_weights: Tensor | None = None  # [R] float, rewards = sum of weight x term (unless shaped)
    prompt_ids: Sequence[str] | None = None  # [P]
    state: Mapping[str, Any] | None = None  # what was kept of the steps before; nothing yet: None or {}


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
    centered, num_judged = centered_rewards(rewards)
    return centered / (group_std(centered, num_judged) + eps)


def dr_grpo_advantages(rewards: Tensor) -> Tensor:
    """Dr.GRPO (arXiv 2503.20783): A = R - mean, [P, G] -> [P, G]; no weight on easy and hard prompts."""
    return centered_rewards(rewards)[0]


def rloo_advantages(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): A = R - mean of the *other* samples = n / (n - 1) * (R - mean), [P, G]."""
    centered, num_judged = centered_rewards(rewards)
    return centered * num_judged / (num_judged - 1).clamp(min=1)


def reinforce_plus_plus_baseline_advantages(rewards: Tensor, lengths: Tensor, eps: float = 1e-6) -> Tensor:
    """REINFORCE++ with group baseline (arXiv 2501.03262): R - mean, then whitened over the batch's tokens.

    [P, G], [P, G] -> [P, G]. Each sample counts with its length in the batch's mean and (unbiased) std.
    Only tokens that are trained on take part, those of judged samples in mixed groups.
    """
    centered, _ = centered_rewards(rewards)
    is_trained = mixed_groups(rewards).unsqueeze(1) & ~rewards.isnan()
    num_tokens = torch.where(is_trained, lengths, 0).to(rewards.dtype)
    total = num_tokens.sum()
    deviation = centered - (num_tokens * centered).sum() / total.clamp(min=1)
    variance = (num_tokens * deviation.square()).sum() / (total - 1).clamp(min=1)
    return torch.where(is_trained, deviation / (variance.sqrt() + eps), 0.0)


def opo_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """OPO (arXiv 2505.23585): A = R - b, b = sum(length * R) / sum(length) in the group.

    [P, G], [P, G] -> [P, G]. The baseline of least variance where a sample's squared score grows with its
    length; weighted by length, A sums to 0. ``lengths`` counts trained tokens, so a masked sample, without a
    gradient, has no weight.
    """
    centered, _ = centered_rewards(rewards)  # the baseline of R - mean is that of R, less the mean
    num_tokens = torch.where(rewards.isnan(), 0, lengths).to(rewards.dtype)
    total = num_tokens.sum(dim=1, keepdim=True).clamp(min=1)
    baseline = (num_tokens * centered).sum(dim=1, keepdim=True) / total
    is_trained = mixed_groups(rewards).unsqueeze(1) & ~rewards.isnan()
    return torch.where(is_trained, centered - baseline, 0.0)


def reinforce_advantages(
    rewards: Tensor, is_correct: Tensor, right_weight: float, wrong_weight: float
) -> Tensor:
    """PSR, NSR, W-REINFORCE (arXiv 2506.01347): A = right_weight * R - wrong_weight * (1 - R), R in {0, 1}.

    [P, G], [P, G] bool -> [P, G]. (1, 0) is PSR, right answers alone; (0, 1) NSR, wrong ones alone; (0.1, 1)
    W-REINFORCE. There is no baseline, so groups that are all right or all wrong have a signal, too. PSR and
    NSR train on no sample with A = 0, as the authors' program does: it is in no denominator of the loss.
    """
    advantages = torch.full_like(rewards, -wrong_weight).masked_fill(is_correct, right_weight)
    return torch.where(rewards.isnan(), 0.0, advantages)


def centered_rewards(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """R - mean of the judged samples [P, G], 0 where there is nothing to learn; their number [P, 1]."""
    is_judged = ~rewards.isnan()
    num_judged = is_judged.sum(dim=1, keepdim=True)
    mean = torch.where(is_judged, rewards, 0.0).sum(dim=1, keepdim=True) / num_judged.clamp(min=1)
    is_trained = mixed_groups(rewards).unsqueeze(1) & is_judged
    return torch.where(is_trained, rewards - mean, 0.0), num_judged


def group_std(centered: Tensor, num_judged: Tensor) -> Tensor:
    """The unbiased std of each group, [P, 1], of what ``centered_rewards`` gives; 0 of fewer than two."""
    return (centered.square().sum(dim=1, keepdim=True) / (num_judged - 1).clamp(min=1)).sqrt()
