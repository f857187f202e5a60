"""The second signal of a group, for losses that declare the need "target_advantages"."""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.objectives.advantages import centered_rewards, group_std


def median_normalized_rewards(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """z = (R - median) / (std + eps) within each group (GBPO, arXiv 2604.18578), [P, G] -> [P, G].

    The median of an even number is the mean of the two in the middle; std is the unbiased one. As with
    advantages, a NaN reward is in no statistic and gets 0, and so does a group whose rewards do not differ.
    """
    centered, num_judged = centered_rewards(rewards)
    median = torch.where(rewards.isnan(), torch.nan, centered).nanquantile(0.5, dim=1, keepdim=True)
    deviation = torch.where(rewards.isnan(), 0.0, centered - median)
    return deviation / (group_std(centered, num_judged) + eps)
