"""The samples of all ranks, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apo_megatron.parallel.collectives import all_gather_arrays, all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.types import Completion, FinishReason, Prompt, Sample, SampleGroup


@dataclass(frozen=True)
class _Columns:
    """All of N samples but tokens and log-probs, as a few lists, which are quick to pickle."""

    lengths: list[int]  # [N], tokens
    texts: list[str]
    finish_reasons: list[FinishReason]
    versions: list[tuple[tuple[int, int], ...]]
    rewards: list[float | None]

    @staticmethod
    def of(samples: Sequence[Sample]) -> _Columns:
        completions = [sample.completion for sample in samples]
        return _Columns(
            lengths=[len(c.token_ids) for c in completions],
            texts=[c.text for c in completions],
            finish_reasons=[c.finish_reason for c in completions],
            versions=[c.versions for c in completions],
            rewards=[sample.reward for sample in samples],
        )

    def samples(self, token_ids: np.ndarray, log_probs: np.ndarray) -> Iterator[Sample]:
        """The samples; their arrays are views of the two, which hold one sample after the other."""
        end = 0
        for i, length in enumerate(self.lengths):
            start, end = end, end + length
            completion = Completion(
                token_ids[start:end],
                log_probs[start:end],
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
    own = [sample for group in groups for sample in group.samples]
    columns = all_gather_objects(_Columns.of(own), parallel)
    sizes = [sum(share.lengths) for share in columns]
    completions = [sample.completion for sample in own]
    token_ids = np.concatenate([np.empty(0, np.int32), *(c.token_ids for c in completions)])
    log_probs = np.concatenate([np.empty(0, np.float32), *(c.log_probs for c in completions)])
    both = np.concatenate([token_ids, log_probs.view(np.int32)])  # bit for bit
    arrays = all_gather_arrays(both, [2 * size for size in sizes], parallel)
    samples = [
        share.samples(array[:size], array[size:].view(np.float32))
        for share, array, size in zip(columns, arrays, sizes, strict=True)
    ]
    group_size = sum(len(share.lengths) for share in columns) // len(order)
    mine = iter(groups)
    return [
        next(mine)
        if rank == parallel.rank
        else SampleGroup(prompt, [next(samples[rank]) for _ in range(group_size)])
        for prompt, rank in order
    ]
