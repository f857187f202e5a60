"""Choosing tokens of the whole mini-batch: the same ones in every layout, and after a resume.

Which token it is follows from its sequence and its place there, never from where it is computed. What is
drawn, and what decides between equal values, is a random key that hangs on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from apo_megatron.objectives.interface import MiniBatchInputs


def token_keys(inputs: MiniBatchInputs) -> Tensor:
    """A random key in [0, 2^63) for each token, [T] int64: the n-th number of its sequence's seed."""
    lengths = torch.bincount(inputs.sequence_ids, minlength=len(inputs.draw_seeds)).tolist()
    keys = [
        np.random.default_rng(seed).integers(2**63, size=length)
        for seed, length in zip(inputs.draw_seeds.tolist(), lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *keys]))


def num_chosen(share: float, num_tokens: int) -> int:
    """``share`` of the mini-batch's tokens: at least one where the share is not 0."""
    return max(1, int(share * num_tokens)) if share > 0 else 0


def draw(candidates: Tensor, count: int, inputs: MiniBatchInputs) -> Tensor:
    """``count`` tokens of the mini-batch's ``candidates`` [T] bool, or all if there are fewer: [T] bool."""
    keys = token_keys(inputs)
    everywhere = inputs.gather(keys[candidates])
    count = min(count, len(everywhere))
    if not count:
        return torch.zeros_like(candidates)
    return candidates & (keys <= everywhere.sort().values[count - 1])


def largest(values: Tensor, count: int, inputs: MiniBatchInputs) -> Tensor:
    """The ``count`` tokens of the mini-batch with the largest ``values`` [T]: [T] bool. NaN comes last."""
    values, keys = torch.where(values.isnan(), -torch.inf, values), token_keys(inputs)
    everywhere, all_keys = inputs.gather(values), inputs.gather(keys)
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    bound = everywhere.topk(count).values[-1]
    # The rest of them among the tokens of exactly this value: those of the smallest keys.
    num_left = count - int((everywhere > bound).sum())
    last_key = all_keys[everywhere == bound].sort().values[num_left - 1]
    return (values > bound) | ((values == bound) & (keys <= last_key))
