"""Advantages from several rewards, compared one by one before they are added up.

[P, G, R]: R rewards ("terms") of each sample, with weights [R]. A sample that one of them could not judge
(NaN) is left out of all statistics. Terms that do not differ in a group add 0, and where the weighted terms
cancel out, the group gets 0: what rounding leaves of them must not become an advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.objectives.advantages import (
    centered_rewards,
    group_normalized_advantages,
    group_std,
    mixed_groups,
)


def gdpo_advantages(terms: Tensor, weights: Tensor, eps: float = 1e-6) -> Tensor:
    """GDPO (arXiv 2601.05242): sum over the terms of weight * GRPO advantage, then whitened over the batch.

    [P, G, R], [R] -> [P, G]. The (unbiased) std of the whitening is that of the judged samples of the groups
    in which a term differs, as the others are not trained on; the mean is 0 in each group already.
    """
    by_term = _by_term(terms)
    summed = _weighted_sum([group_normalized_advantages(term, eps) for term in by_term], weights)
    is_trained = summed.ne(0).any(dim=1, keepdim=True) & ~by_term[0].isnan()
    variance = summed.square().sum() / (is_trained.sum() - 1).clamp(min=1)
    return (summed / (variance.sqrt() + eps)).to(terms.dtype)


def dvao_advantages(terms: Tensor, weights: Tensor, eps: float = 1e-6) -> Tensor:
    """DVAO (arXiv 2605.25604): A = sum_k w_k (r_k - mean_k) / (sum_l |w_l| s_l + eps), s the group's std.

    [P, G, R], [R] -> [P, G]; it is the sum of GRPO advantages with weights w_k s_k / sum_l w_l s_l: a term
    counts by how much it differs in the group. Experimental: known at second hand. |w| for negative weights
    and eps (where nothing differs) are ours, and so is std with divisor n - 1.
    """
    centered, stds = [], []
    for term in _by_term(terms):
        of_term, num_judged = centered_rewards(term)
        centered.append(of_term)
        stds.append(group_std(of_term, num_judged))
    scale = torch.cat(stds, dim=1) @ weights.double().abs()
    return (_weighted_sum(centered, weights) / (scale.unsqueeze(1) + eps)).to(terms.dtype)


def _by_term(terms: Tensor) -> list[Tensor]:
    """R tensors [P, G] fp64; NaN in all of them where one is."""
    is_unjudged = terms.isnan().any(dim=-1, keepdim=True)
    return list(terms.double().masked_fill(is_unjudged, torch.nan).unbind(dim=-1))


def _weighted_sum(of_terms: list[Tensor], weights: Tensor) -> Tensor:
    """R tensors [P, G], [R] -> [P, G] fp64; 0 in groups that span at most ``MIN_SPREAD``."""
    summed = torch.stack(of_terms, dim=-1) @ weights.double()
    return torch.where(mixed_groups(summed).unsqueeze(1), summed, 0.0)
