"""Sequences one after the other along one axis, and which part of them a context-parallel rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

HOST_FIELDS = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded")  # of PackedSequences


@dataclass
class PackedSequences(PackedSeqParams):
    """What Megatron's layers need of packed ("thd") sequences, and their lengths on the host."""

    lengths: tuple[int, ...] = ()  # of whole sequences, not of a rank's part

    @staticmethod
    def of_lengths(lengths: Sequence[int]) -> PackedSequences:
        """Of sequences with ``lengths`` tokens each."""
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        # Else Megatron would take the rotary table for one of all sequences together.
        assert max(lengths) < sum(lengths) or len(lengths) == 1
        longest = max(lengths)
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            # Only the rotary embedding reads these, as a list, in every layer: they stay in host memory.
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
        )


def context_positions(lengths: Sequence[int], rank: int, world: int) -> np.ndarray:
    """Where the tokens of context-parallel rank ``rank`` lie among all, int64, in the order it has them.

    Each sequence is cut into 2 * ``world`` equal chunks, which its length must allow; a rank has chunk
    ``rank`` and chunk 2 * world - 1 - rank. Under causal attention that gives all ranks equal work (Megatron
    and TransformerEngine lay tokens out so).
    """
    if world == 1:
        return np.arange(sum(lengths))
    parts = []
    start = 0
    for length in lengths:
        assert length % (2 * world) == 0, f"{length} tokens do not divide into {2 * world} chunks"
        chunk = length // (2 * world)
        for number in (rank, 2 * world - 1 - rank):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return np.concatenate(parts)
