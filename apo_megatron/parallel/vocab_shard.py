"""Which columns of the vocabulary a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, end) of the padded vocabulary, held by this rank.

    Columns at and above ``vocab_size`` are padding: whatever they hold, they count as -inf, are never in a
    Top-K and get a zero gradient. ``group`` holds the ranks of all columns, in the order of the columns; None
    means that nothing is sharded.
    """

    start: int
    end: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of_rank(
        rank: int, world: int, padded_vocab_size: int, vocab_size: int, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """The ``rank``-th of ``world`` equal shards, as Megatron lays them out."""
        assert padded_vocab_size % world == 0, f"{padded_vocab_size} columns do not divide over {world} ranks"
        width = padded_vocab_size // world
        return VocabShard(rank * width, (rank + 1) * width, vocab_size, group)

    @property
    def width(self) -> int:
        return self.end - self.start

    @property
    def num_real_columns(self) -> int:
        """Columns of this shard that are tokens; they come first."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def check(self, logits: Tensor, temperature: float) -> None:
        assert logits.dim() == 2 and logits.shape[1] == self.width, (
            f"logits {tuple(logits.shape)} are not [T, {self.width}] of {self}"
        )
        assert temperature > 0, f"temperature must be positive, not {temperature}"
