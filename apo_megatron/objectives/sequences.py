"""Sums over whole sequences, of tokens that context parallelism may have spread over ranks.

A loss that looks at whole sequences declares the need "whole_sequences" and finds ``LossInputs.sequences``.
The functions below give a value for each token of this rank, [T] -> [T], without a gradient. They sum in
float64, so that it does not matter what else is in the micro-batch. Values must be finite: one that is not
would spoil those of the sequences after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeSequences:
    """The trained tokens of a micro-batch on all context-parallel ranks, and the way there and back.

    Where this rank has all tokens, both ways are the identity. ``gather`` is collective over the
    context-parallel ranks, also for T = 0.
    """

    ids: Tensor  # [T_all] int64; the tokens of a sequence are neighbours, in order
    gather: Callable[[Tensor], Tensor]  # [T] -> [T_all], no gradient
    here: Callable[[Tensor], Tensor]  # [T_all] -> [T]

    @staticmethod
    def all_here(ids: Tensor) -> WholeSequences:
        """Of tokens that no other rank has a part of; ``ids`` [T] as in ``LossInputs.sequence_ids``."""
        return WholeSequences(ids, lambda values: values, lambda values: values)


@torch.no_grad()
def sequence_sum(values: Tensor, sequences: WholeSequences) -> Tensor:
    """The sum over the token's sequence."""
    return _here(_totals(_everywhere(values, sequences), sequences), values, sequences)


@torch.no_grad()
def sequence_mean(values: Tensor, sequences: WholeSequences) -> Tensor:
    """The mean over the token's sequence."""
    everywhere = _everywhere(values, sequences)
    lengths = _totals(torch.ones_like(everywhere), sequences)
    return _here(_totals(everywhere, sequences) / lengths, values, sequences)


@torch.no_grad()
def prefix_sum(values: Tensor, sequences: WholeSequences) -> Tensor:
    """The sum over the token's sequence up to the token itself."""
    running = _everywhere(values, sequences).cumsum(0)
    before = torch.cat([running.new_zeros(1), running])[_first_places(sequences)]
    return _here(running - before, values, sequences)


@torch.no_grad()
def position_in_sequence(values: Tensor, sequences: WholeSequences) -> Tensor:
    """1 for the first trained token of a sequence, 2 for the next; ``values`` gives nothing but the dtype."""
    places = torch.arange(len(sequences.ids), device=sequences.ids.device)
    return _here(places - _first_places(sequences) + 1, values, sequences)


@torch.no_grad()
def sequence_quantile(values: Tensor, quantile: float, sequences: WholeSequences) -> Tensor:
    """The ``quantile`` (0 to 1) over the token's sequence, interpolated as by ``torch.quantile``."""
    everywhere = _everywhere(values, sequences)
    starts, counts = _first_places(sequences), _totals(torch.ones_like(everywhere), sequences)
    by_value = everywhere.argsort(stable=True)
    ascending = everywhere[by_value[starts[by_value].argsort(stable=True)]]  # each sequence in its place
    places = quantile * (counts - 1)
    low, high = places.floor().long(), places.ceil().long()
    found = torch.lerp(ascending[starts + low], ascending[starts + high], places - low)
    return _here(found, values, sequences)


def _everywhere(values: Tensor, sequences: WholeSequences) -> Tensor:
    return sequences.gather(values.detach()).double()


def _here(values: Tensor, like: Tensor, sequences: WholeSequences) -> Tensor:
    return sequences.here(values).to(like.dtype)


def _totals(values: Tensor, sequences: WholeSequences) -> Tensor:
    """[T_all] -> [T_all]: for each token the sum over its sequence."""
    numbers = _is_first(sequences).cumsum(0) - 1
    return torch.zeros_like(values).index_add_(0, numbers, values)[numbers]


def _first_places(sequences: WholeSequences) -> Tensor:
    """[T_all] int64: for each token the place where its sequence begins."""
    is_first = _is_first(sequences)
    places = torch.arange(len(is_first), device=is_first.device)
    return torch.where(is_first, places, 0).cummax(0).values


def _is_first(sequences: WholeSequences) -> Tensor:
    """[T_all] bool."""
    is_first = torch.ones_like(sequences.ids, dtype=torch.bool)
    is_first[1:] = sequences.ids[1:] != sequences.ids[:-1]
    return is_first
