"""From sample groups to padded tensors: the only next-token shift, and the global denominators.

Every rank holds all groups of the step (advantages need them), so every rank derives the same
mini-batches and the same denominators; a rank keeps only its own share of the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.data.packing import deal
from apo_megatron.objectives.aggregation import sequence_weights
from apo_megatron.objectives.objective import ReferenceScope, build_objective
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import PaddedSequences, Sample, SampleGroup, solve_rate


@dataclass(frozen=True)
class TrainingSequence:
    """One sequence to train on."""

    token_ids: np.ndarray  # [L] int, prompt then response
    prompt_length: int
    advantage: float = 0.0
    rollout_log_probs: np.ndarray | None = None  # [L - prompt_length] float32
    solve_rate: float | None = None  # share of right answers among those of its prompt that were judged
    group: int = -1  # the same for all samples of a prompt and for no others; -1 = unknown
    target_advantage: float | None = None  # where the loss needs it


@dataclass
class Batch:
    """One step's sequences of this data rank, divided into mini-batches (one optimizer update each)."""

    # [N, S], mini-batch after mini-batch, in host memory; the actor's passes fill its fields
    sequences: PaddedSequences
    mini_batch_sizes: tuple[int, ...]  # of this rank; sums to N
    num_wrong: int  # of these sequences have A < 0
    rows: list[int]  # [N], which of the step's trained sequences these are
    # From the updates, on the last stage: a mini-batch [T] bool each, on which tokens (row-major) the pull
    # acted.
    pulled: list[torch.Tensor] = field(default_factory=list)

    @property
    def num_sequences(self) -> int:
        return self.sequences.num_sequences

    def num_in_scope(self, reference_scope: ReferenceScope) -> int:
        """Sequences of this rank that a reference pass of that scope looks at."""
        return {"none": 0, "wrong": self.num_wrong, "all": self.num_sequences}[reference_scope]

    def mini_batches(self) -> list[PaddedSequences]:
        """The share of this rank in each mini-batch (possibly empty)."""
        rows = torch.arange(self.sequences.num_sequences)
        return [self.sequences.select(part) for part in rows.split(list(self.mini_batch_sizes))]


def trained_samples(groups: Sequence[SampleGroup]) -> list[tuple[SampleGroup, Sample]]:
    """The samples that carry a gradient: those with an advantage, in groups that teach something.

    Groups with advantage 0 everywhere, as those of equal rewards, are left out. A sample whose advantage is
    None could not be judged, or was cut at rollout.max_new_tokens and is masked (rollout.mask_truncated): its
    tokens are in no loss and in no denominator. As in DAPO's overlong filtering (arXiv 2503.14476), masking
    is done after the advantages of its group are known, so its reward counts in their baseline. Some
    estimators leave out every sample of advantage 0, and rollout.sample_filter leaves out what it likes.
    """
    return [
        (group, sample)
        for group in groups
        if any(sample.advantage for sample in group.samples)
        for sample in group.samples
        if sample.advantage is not None and not sample.is_left_out and not sample.is_filtered_out
    ]


def trained_sequences(groups: Sequence[SampleGroup]) -> list[TrainingSequence]:
    """The sequences of ``trained_samples``, in that order."""
    solve_rates = {id(g): solve_rate([sample.reward for sample in g.samples]) or 0.0 for g in groups}
    numbers = {id(group): number for number, group in enumerate(groups)}
    return [
        TrainingSequence(
            token_ids=np.concatenate([group.prompt.token_ids, sample.completion.token_ids]),
            prompt_length=len(group.prompt.token_ids),
            advantage=sample.advantage or 0.0,
            rollout_log_probs=sample.completion.log_probs,
            solve_rate=solve_rates[id(group)],
            group=numbers[id(group)],
            target_advantage=sample.target_advantage,
        )
        for group, sample in trained_samples(groups)
    ]


def make_batch(
    sequences: Sequence[TrainingSequence],
    objective: ObjectiveConfig,
    parallel: ParallelContext,
    num_mini_batches: int,
    seed: tuple[int, int],
) -> Batch:
    """Shuffle ``sequences`` of all ranks, cut them into mini-batches and keep this rank's share.

    The division depends on ``seed`` (run, step) only, and every denominator is taken over a whole
    mini-batch, so loss and gradients do not depend on the layout. With fewer sequences than mini-batches
    there are fewer mini-batches. A loss that compares the samples of a prompt finds them in one mini-batch.
    Where ``objective`` trusts the engine (old_log_probs = rollout), its log-probs are those of the old
    policy, too.
    """
    assert sequences, "an empty batch is skipped before it is collated"
    rng = np.random.default_rng(seed)
    # What stays together: a sequence, or all of a group.
    whole_groups = build_objective(objective).spec.whole_groups
    units = _rows_by_group(sequences) if whole_groups else [[row] for row in range(len(sequences))]
    cut = np.array_split(rng.permutation(len(units)), min(num_mini_batches, len(units)))
    parts = [torch.tensor([row for unit in part for row in units[unit]]) for part in cut]
    lengths = torch.tensor([len(s.token_ids) - s.prompt_length for s in sequences])
    weights = torch.zeros(len(sequences))
    for part in parts:
        weights[part] = sequence_weights(
            objective.loss_aggregation, lengths[part], objective.loss_aggregation_constant
        ).float()
    mine = [part[_share_of_rank([len(sequences[i].token_ids) for i in part], parallel)] for part in parts]
    rows = torch.cat(mine).tolist()
    padded = _pad([sequences[i] for i in rows], weights[rows].tolist())
    if sequences[0].rollout_log_probs is None:  # demonstrations were not sampled
        padded.pop("rollout_log_probs")
    elif objective.old_log_probs == "rollout":
        padded["old_log_probs"] = padded["rollout_log_probs"]
    if "solve_rates" in build_objective(objective).needs:
        rates = torch.tensor([sequences[row].solve_rate for row in rows], dtype=torch.float32)
        padded["solve_rates"] = rates.unsqueeze(1).expand_as(padded["loss_mask"])
    draw_seeds = rng.integers(2**63, size=len(sequences))
    if sequences[0].target_advantage is not None:
        targets = torch.tensor([sequences[row].target_advantage for row in rows], dtype=torch.float32)
        padded["target_advantages"] = torch.where(padded["loss_mask"], targets.unsqueeze(1), 0.0)
    return Batch(
        sequences=PaddedSequences(
            **padded,
            draw_seeds=torch.from_numpy(draw_seeds)[rows],
            groups=torch.tensor([sequences[row].group for row in rows], dtype=torch.int64),
        ),
        mini_batch_sizes=tuple(len(part) for part in mine),
        num_wrong=sum(sequences[row].advantage < 0 for row in rows),
        rows=rows,
    )


def _rows_by_group(sequences: Sequence[TrainingSequence]) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        assert sequence.group >= 0, "this loss must know which sequences belong together"
        rows.setdefault(sequence.group, []).append(row)
    return list(rows.values())


def _share_of_rank(lengths: Sequence[int], parallel: ParallelContext) -> torch.Tensor:
    """Which of the sequences of a mini-batch this data rank takes: as many tokens as the others, about."""
    return torch.tensor(deal(lengths, parallel.dims.data)[parallel.data_rank], dtype=torch.int64)


def make_scoring_batch(token_ids: Sequence[np.ndarray]) -> PaddedSequences:
    """All of the sequences on every rank, each [L] int with L >= 2; the mask covers tokens 1..L-1."""
    assert token_ids and all(len(tokens) >= 2 for tokens in token_ids), "a first token has no log-prob"
    sequences = [TrainingSequence(tokens, prompt_length=1) for tokens in token_ids]
    padded = _pad(sequences, [0.0] * len(sequences))
    padded.pop("rollout_log_probs")
    return PaddedSequences(**padded)


def _pad(sequences: list[TrainingSequence], weights: list[float]) -> dict[str, torch.Tensor]:
    shape = (len(sequences), max((len(s.token_ids) for s in sequences), default=2) - 1)
    tokens, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask = np.zeros(shape, bool)
    advantages, loss_weights = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    rollout = np.zeros(shape, np.float32)
    for row, sequence in enumerate(sequences):
        end = len(sequence.token_ids) - 1
        response = slice(sequence.prompt_length - 1, end)  # position t predicts token t + 1
        tokens[row, :end] = sequence.token_ids[:-1]
        targets[row, :end] = sequence.token_ids[1:]
        mask[row, response] = True
        advantages[row, response] = sequence.advantage
        loss_weights[row, response] = weights[row]
        if sequence.rollout_log_probs is not None:
            rollout[row, response] = sequence.rollout_log_probs
    return {
        "tokens": torch.from_numpy(tokens),
        "targets": torch.from_numpy(targets),
        "loss_mask": torch.from_numpy(mask),
        "advantages": torch.from_numpy(advantages),
        "loss_weights": torch.from_numpy(loss_weights),
        "rollout_log_probs": torch.from_numpy(rollout),
    }
