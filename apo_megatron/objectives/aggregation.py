"""How token losses become one number, as a weight per token.

The loss of a mini-batch is sum_t weight[sequence of t] * loss[t]. The weights come from the lengths of the
whole mini-batch, so every split over ranks and micro-batches adds up to the same number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossAggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def sequence_weights(mode: LossAggregation, lengths: Tensor, constant: int | None = None) -> Tensor:
    """Weight of each token of each sequence of a mini-batch: lengths [N] -> [N] float64.

    ``lengths`` counts the trained tokens of *all* sequences of the mini-batch; a sequence without any has
    weight 0 and does not count in N.

    - ``token-mean``: 1 / sum(lengths) (DAPO, arXiv 2503.14476);
    - ``seq-mean-token-mean``: 1 / (N * length) (GRPO, arXiv 2402.03300);
    - ``seq-mean-token-sum-norm``: 1 / (N * constant) (Dr.GRPO, arXiv 2503.20783).
    """
    trained = lengths.double()
    is_trained = trained > 0
    num_sequences = is_trained.double().sum()
    if mode == "token-mean":
        denominators = trained.sum().expand_as(trained)
    elif mode == "seq-mean-token-mean":
        denominators = num_sequences * trained
    else:
        assert mode == "seq-mean-token-sum-norm" and constant is not None, (mode, constant)
        denominators = (num_sequences * constant).expand_as(trained)
    return torch.where(is_trained, 1.0 / denominators, 0.0)
