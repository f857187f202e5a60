"""The samples of all ranks, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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
    reward_terms: list[tuple[float, ...] | None]

    @staticmethod
    def of(samples: Sequence[Sample]) -> SampleColumns:
        completions = [sample.completion for sample in samples]
        return SampleColumns(
            lengths=[len(c.token_ids) for c in completions],
            texts=[c.text for c in completions],
            finish_reasons=[c.finish_reason for c in completions],
            versions=[c.versions for c in completions],
            rewards=[sample.reward for sample in samples],
            reward_terms=[sample.reward_terms for sample in samples],
        )

    def samples(self, token_ids: np.ndarray, log_probs: np.ndarray) -> list[Sample]:
        """The samples; their arrays are views of the two, which hold one sample after the other."""
        ends = [0, *accumulate(self.lengths)]
        places = [slice(start, end) for start, end in pairwise(ends)]
        rows = zip(
            [token_ids[place] for place in places],
            [log_probs[place] for place in places],
            self.texts,
            self.finish_reasons,
            self.versions,
            strict=True,
        )
        return [
            Sample(Completion(*row), reward, reward_terms=terms)
            for row, reward, terms in zip(rows, self.rewards, self.reward_terms, strict=True)
        ]


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
    group_sizes = [sum(columns.lengths) for _, _, columns in order]
    sizes = [0] * parallel.world  # tokens by rank
    for (_, rank, _), size in zip(order, group_sizes, strict=True):
        sizes[rank] += size
    parts = [c.token_ids for c in completions] + [c.log_probs.view(np.int32) for c in completions]
    shares = all_gather_arrays(parts, [2 * size for size in sizes], np.dtype(np.int32), parallel)
    mine = iter(groups)
    starts = [0] * parallel.world
    gathered = []
    for (prompt, rank, columns), size in zip(order, group_sizes, strict=True):
        if rank == parallel.rank:
            gathered.append(next(mine))
            continue
        start, log_probs_start = starts[rank], sizes[rank] + starts[rank]
        starts[rank] += size
        samples = columns.samples(
            shares[rank][start : start + size],
            shares[rank][log_probs_start : log_probs_start + size].view(np.float32),  # bit for bit
        )
        gathered.append(SampleGroup(prompt, samples))
    return gathered
