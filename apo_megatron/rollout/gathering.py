"""The samples of all ranks, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apo_megatron.parallel.collectives import all_gather_arrays
from apo_megatron.parallel.world import World
from apo_megatron.types import Completion, FinishReason, Prompt, Sample, SampleGroup


@dataclass(frozen=True)
class SampleColumns:
    """All of N samples but tokens and log-probs, as a few lists, which are quick to pickle."""

    lengths: list[int]  # [N], tokens
    texts: list[str]
    finish_reasons: list[FinishReason]
    versions: list[tuple[tuple[int, int], ...]]
    rewards: list[float | None]

    @staticmethod
    def of(samples: Sequence[Sample]) -> SampleColumns:
        completions = [sample.completion for sample in samples]
        return SampleColumns(
            lengths=[len(c.token_ids) for c in completions],
            texts=[c.text for c in completions],
            finish_reasons=[c.finish_reason for c in completions],
            versions=[c.versions for c in completions],
            rewards=[sample.reward for sample in samples],
        )

    def samples(self, token_ids: np.ndarray, log_probs: np.ndarray) -> list[Sample]:
        """The samples; their arrays are views of the two, which hold one sample after the other."""
        found = []
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
            found.append(Sample(completion, self.rewards[i]))
        return found


def gather_groups(
    groups: Sequence[SampleGroup], order: Sequence[tuple[Prompt, int, SampleColumns]], parallel: World
) -> list[SampleGroup]:
    """The groups of all ranks, on every rank. Collective.

    ``order`` holds (prompt, rank that has its group, columns of its samples), the same on every rank;
    ``groups`` are those of this rank, in that order. Advantages and mini-batches need the whole step; token
    ids and log-probs are 8 bytes a token.
    """
    if parallel.world == 1:
        return list(groups)
    completions = [sample.completion for group in groups for sample in group.samples]
    token_ids = np.concatenate([np.empty(0, np.int32), *(c.token_ids for c in completions)])
    log_probs = np.concatenate([np.empty(0, np.float32), *(c.log_probs for c in completions)])
    sizes = [0] * parallel.world  # tokens by rank
    for _, rank, columns in order:
        sizes[rank] += sum(columns.lengths)
    both = np.concatenate([token_ids, log_probs.view(np.int32)])  # bit for bit
    shares = all_gather_arrays(both, [2 * size for size in sizes], parallel)
    mine = iter(groups)
    starts = [0] * parallel.world
    gathered = []
    for prompt, rank, columns in order:
        start, size = starts[rank], sum(columns.lengths)
        starts[rank] += size
        if rank == parallel.rank:
            gathered.append(next(mine))
            continue
        of_rank, log_probs_start = shares[rank], sizes[rank] + start
        samples = columns.samples(
            of_rank[start : start + size],
            of_rank[log_probs_start : log_probs_start + size].view(np.float32),
        )
        gathered.append(SampleGroup(prompt, samples))
    return gathered
