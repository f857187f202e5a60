"""DMPO: the policy's distribution over the answers of a prompt is drawn towards one of their advantages."""

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
    """DMPO (arXiv 2605.19461): the loss of ``vanilla``, plus coeff mean_i (p_i - q_i)^2. [code]

    Over the trained answers i of each prompt, with T_i tokens each: p = softmax(A / temperature), q =
    softmax(s), s_i = mean_t log pi(y_t). The term stands beside the aggregation: coeff times the mean over
    the answers of the mini-batch, whatever ``loss_aggregation`` is, and neither a mismatch correction nor
    the off-policy mask reaches it. The authors' groups are those of a micro-batch, ours are whole.

    Its gradient is exact though no group is looked at as a whole. With D that mean and c_i = dD/ds_i
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

    def means(values: Tensor) -> Tensor:
        return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, answer_of, values) / lengths

    found = softmax(means(inputs.log_probs))
    gap = found - softmax(means(inputs.advantages) / cfg.dmpo.temperature)
    # Of answer i: (p_i - q_i)^2 and its part of c_i, both to be divided by T_i and the number of answers.
    distance = gap.square()
    slope = 2 * found * (gap - group_sums(gap * found)[members])
    divisor = lengths * inputs.sum(torch.ones_like(gap).sum())
    return {"share": (distance / divisor)[answer_of], "slope": (slope / divisor)[answer_of]}


GROUP_DISTANCES = BatchStatistics(("share", "slope"), _group_distances)
