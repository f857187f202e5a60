"""How token losses become one number, as a weight per token.

The loss of a mini-batch is sum_t weight[sequence of t] * loss[t]. The weights come from the lengths of the
whole mini-batch, so every split over ranks and micro-batches adds up to the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
# (lengths [N] float64 of the N sequences with a trained token, constant) -> a denominator for each, [N].
Denominators = Callable[[Tensor, int | None], Tensor]


def token_mean(lengths: Tensor, constant: int | None) -> Tensor:
    """sum(lengths): DAPO, arXiv 2503.14476."""
    return lengths.sum().expand_as(lengths)


def seq_mean_token_mean(lengths: Tensor, constant: int | None) -> Tensor:
    """N * length: GRPO, arXiv 2402.03300."""
    return len(lengths) * lengths


def seq_mean_token_sum_norm(lengths: Tensor, constant: int | None) -> Tensor:
    """N * constant: Dr.GRPO, arXiv 2503.20783."""
    assert constant is not None, "a rule of the configuration wants it"
    return torch.full_like(lengths, len(lengths) * constant)


LOSS_AGGREGATIONS: dict[LossAggregation, Denominators] = {
    "token-mean": token_mean,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
}


def sequence_weights(mode: LossAggregation, lengths: Tensor, constant: int | None = None) -> Tensor:
    """Weight of each token of each sequence of a mini-batch: lengths [N] -> [N] float64.

    ``lengths`` counts the trained tokens of *all* sequences of the mini-batch; a sequence without any has
    weight 0 and does not count in N.
    """
    trained = lengths.double()
    is_trained = trained > 0
    weights = torch.zeros_like(trained)
    weights[is_trained] = 1.0 / LOSS_AGGREGATIONS[mode](trained[is_trained], constant)
    return weights
