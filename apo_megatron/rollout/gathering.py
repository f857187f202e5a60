"""The samples of all ranks, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.types import Completion, FinishReason, Prompt, Sample, SampleGroup


@dataclass(frozen=True)
class _PackedSamples:
    """N samples as few large objects, which are quick to pickle."""

    lengths: list[int]  # [N], tokens
    token_ids: np.ndarray  # [sum of lengths] int32
    log_probs: np.ndarray  # [sum of lengths] float32
    texts: list[str]
    finish_reasons: list[FinishReason]
    versions: list[tuple[tuple[int, int], ...]]
    rewards: list[float | None]

    @staticmethod
    def pack(samples: Sequence[Sample]) -> _PackedSamples:
        completions = [sample.completion for sample in samples]
        return _PackedSamples(
            lengths=[len(c.token_ids) for c in completions],
            token_ids=np.concatenate([np.empty(0, np.int32), *(c.token_ids for c in completions)]),
            log_probs=np.concatenate([np.empty(0, np.float32), *(c.log_probs for c in completions)]),
            texts=[c.text for c in completions],
            finish_reasons=[c.finish_reason for c in completions],
            versions=[c.versions for c in completions],
            rewards=[sample.reward for sample in samples],
        )

    def unpack(self) -> Iterator[Sample]:
        """The samples; their arrays are views of these."""
        end = 0
        for i, length in enumerate(self.lengths):
            start, end = end, end + length
            completion = Completion(
                self.token_ids[start:end],
                self.log_probs[start:end],
                self.texts[i],
                self.finish_reasons[i],
                self.versions[i],
            )
            yield Sample(completion, self.rewards[i])


def gather_groups(
    groups: Sequence[SampleGroup], order: Sequence[tuple[Prompt, int]], parallel: World
) -> list[SampleGroup]:
    """The groups of all ranks, on every rank. Collective.

    ``order`` holds (prompt, rank that has its group), the same on every rank; ``groups`` are those of this
    rank, in that order, all of one size. Advantages and mini-batches need the whole step; token ids and
    log-probs are 8 bytes a token.
    """
    if parallel.world == 1:
        return list(groups)
    own = _PackedSamples.pack([sample for group in groups for sample in group.samples])
    size = len(groups[0].samples) if groups else 0
    shares = all_gather_objects((own, size), parallel)
    size = max(size for _, size in shares)
    samples = [packed.unpack() for packed, _ in shares]
    mine = iter(groups)
    return [
        next(mine)
        if rank == parallel.rank
        else SampleGroup(prompt, [next(samples[rank]) for _ in range(size)])
        for prompt, rank in order
    ]
