"""DMPO: the policy's distribution over the answers of a prompt is drawn towards that of their rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import (
    BatchStatistics,
    LossInputs,
    LossOutputs,
    MiniBatchInputs,
    TokenMetric,
)
from apo_megatron.objectives.policy_losses.clipped import vanilla


def dmpo(inputs: LossInputs, cfg: ObjectiveConfig) -> LossOutputs:
    """DMPO (arXiv 2605.19461): the loss of ``vanilla``, plus coeff mean_g mean_i (p_i - q_i)^2. [second-hand]

    Experimental: no code of the authors was read. Over the n trained answers i of a prompt g, with T_i tokens
    each: p = softmax(sharpness R), q = softmax(s), s_i = mean_t log pi(y_t). The term stands beside the
    aggregation: coeff times the mean over the prompts of the mini-batch, whatever ``loss_aggregation`` is,
    and no mismatch correction weighs it.

    Its gradient is exact though no group is looked at as a whole. With D the mean of means and c_i = dD/ds_i
    under the weights that the update starts from, D and sum_i c_i s_i = sum_t c_i log pi(y_t) / T_i have the
    same gradient there. So a token needs its slope c_i / T_i only, and a group may lie in any micro-batches
    and on any ranks, if all of it lies in one mini-batch (``whole_groups``).
    """
    outputs = vanilla(inputs, cfg)
    share, slope = inputs.statistics["share"], inputs.statistics["slope"]
    moved = inputs.log_probs - inputs.log_probs.detach()  # 0, with the gradient of log pi
    metrics = {**outputs.metrics, "dmpo_distance": TokenMetric(share, reduction="sum")}
    return LossOutputs(outputs.loss, metrics, unweighted=cfg.dmpo.coeff * (share + slope * moved))


def _group_distances(inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    """Of D: the ``share`` of each token, which add up to it, and the ``slope`` dD / d log pi(y_t)."""
    rows, answer_of, lengths = inputs.sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
    assert bool((inputs.groups[rows] >= 0).all()), "this loss must know which answers belong together"
    assert not bool(inputs.rewards[rows].isnan().any()), "what could not be judged is not trained on"
    distinct = inputs.gather(inputs.groups[rows]).unique()
    members = torch.searchsorted(distinct, inputs.groups[rows])

    def group_sums(values: Tensor) -> Tensor:
        return inputs.sum(values.new_zeros(len(distinct)).index_add_(0, members, values))

    def softmax(values: Tensor) -> Tensor:
        highest = values.new_full((len(distinct),), -torch.inf).scatter_reduce(
            0, inputs.gather(members), inputs.gather(values), "amax"
        )
        powers = (values - highest[members]).exp()
        return powers / group_sums(powers)[members]

    totals = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, answer_of, inputs.log_probs)
    found = softmax(totals / lengths)
    gap = found - softmax(cfg.dmpo.sharpness * inputs.rewards[rows])
    # Of answer i: (p_i - q_i)^2 and its part of c_i, both to be divided by n T_i and the number of groups.
    distance = gap.square()
    slope = 2 * found * (gap - group_sums(gap * found)[members])
    divisor = group_sums(torch.ones_like(gap))[members] * lengths * len(distinct)
    return {"share": (distance / divisor)[answer_of], "slope": (slope / divisor)[answer_of]}


GROUP_DISTANCES = BatchStatistics(("share", "slope"), _group_distances)
