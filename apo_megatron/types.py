"""The data that flows through one training step, with shapes written at the fields.

Prompt -> Completion -> Sample -> SampleGroup -> Batch of PaddedSequences -> TrainedTokens of a micro-batch.
Index t of every [B, S] tensor is the logit position that predicts ``targets[:, t]``; the shift from
tokens to targets happens once, in ``data/collate.py``.

B sequences, S padded length, K support size, R response tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]

# In the ids of a reference support: a token of the Top-K that Top-P left out of M.
OUTSIDE_SUPPORT = -2


@dataclass(frozen=True)
class Prompt:
    """One problem. ``fields`` holds every other column of its dataset row (the reward reads them)."""

    prompt_id: str
    text: str
    token_ids: np.ndarray  # [L] int32
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """One answer of an engine. The stop token, where one was sampled, is the last of ``token_ids``."""

    token_ids: np.ndarray  # [R] int32
    log_probs: np.ndarray  # [R] float32, of softmax(logits / T), before top-p / top-k filtering
    text: str  # decoded without the stop token
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]  # (policy version, tokens drawn with it), in order; adds up to R

    @property
    def policy_version(self) -> int:
        """The oldest weights that any of its tokens was drawn with."""
        versions = self.versions
        return versions[0][0] if len(versions) == 1 else min(versions)[0]


@dataclass
class Sample:
    """A completion with its reward and, once its group is complete, its advantage."""

    completion: Completion
    reward: float | None = None
    advantage: float | None = None
    is_left_out: bool = False  # its advantage is 0, and the estimator trains on no such sample
    is_filtered_out: bool = False  # by rollout.sample_filter
    # What each of reward.rewards said, where the advantage estimator looks at them.
    reward_terms: tuple[float, ...] | None = None
    target_advantage: float | None = None  # a second signal, where the loss needs it


@dataclass
class SampleGroup:
    """All samples of one prompt. Groups stay whole until their advantages are assigned."""

    prompt: Prompt
    samples: list[Sample]


def solve_rate(rewards: Sequence[float | None]) -> float | None:
    """The share of right answers (reward 1 or more, unshaped) among those judged; None where none is."""
    judged = [reward for reward in rewards if reward is not None and reward == reward]
    return sum(reward >= 1 for reward in judged) / len(judged) if judged else None


@dataclass(frozen=True)
class PaddedSequences:
    """Right-padded sequences, in host memory. Optional fields are filled by the actor's passes."""

    tokens: torch.Tensor  # [B, S] int64
    targets: torch.Tensor  # [B, S] int64, token that position t predicts
    loss_mask: torch.Tensor  # [B, S] bool, True where targets[:, t] is a trained response token
    advantages: torch.Tensor  # [B, S] fp32
    loss_weights: torch.Tensor  # [B, S] fp32, 1 / global denominator of the aggregation; 0 off the mask
    rollout_log_probs: torch.Tensor | None = None  # [B, S] fp32
    old_log_probs: torch.Tensor | None = None  # [B, S] fp32
    reference_log_probs: torch.Tensor | None = None  # [B, S] fp32
    # What the reference pass keeps of a token: 4 * (K + 1) bytes, nothing of size V.
    reference_support_ids: torch.Tensor | None = (
        None  # [B, S, K] int32, -1 = excluded, padded or no reference, OUTSIDE_SUPPORT = cut by Top-P
    )
    reference_anchor_log_mass: torch.Tensor | None = None  # [B, S] fp32, log Z; NaN where no reference
    # [B, S, K] fp32, of the whole Top-K in its order: also where an id is -1 because it was excluded; -inf
    # beyond the vocabulary, NaN where no reference. Only for losses that look at them.
    reference_support_log_probs: torch.Tensor | None = None
    solve_rates: torch.Tensor | None = None  # [B, S] fp32, of the prompt; only for losses that look at it
    loss_statistics: torch.Tensor | None = None  # [B, S, n] fp32, of the whole mini-batch (BatchStatistics)
    draw_seeds: torch.Tensor | None = (
        None  # [B] int64, what is drawn for a sequence in this step depends on it
    )
    groups: torch.Tensor | None = None  # [B] int64, the same for all samples of a prompt; -1 = unknown
    target_advantages: torch.Tensor | None = None  # [B, S] fp32, where the loss needs them

    @property
    def num_sequences(self) -> int:
        return self.tokens.shape[0]

    def select(self, rows: torch.Tensor) -> PaddedSequences:
        """The sequences at ``rows`` [n] int64, in that order."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return self.with_fields(**{name: None if t is None else t[rows] for name, t in tensors.items()})

    def with_fields(self, **values: torch.Tensor | None) -> PaddedSequences:
        """A copy with some fields replaced."""
        return replace(self, **values)  # type: ignore[arg-type]

    def tokens_at(self, positions: torch.Tensor) -> TrainedTokens:
        """The trained tokens at ``positions`` [T] int64 of the flattened [B * S]."""
        picked: dict[str, Any] = {"sequence_ids": positions // self.tokens.shape[1], "split": None}
        for name in (f.name for f in fields(TrainedTokens) if f.name not in picked):
            values = getattr(self, name)
            picked[name] = None if values is None else values.flatten(0, 1)[positions]
        return TrainedTokens(**picked)


@dataclass(frozen=True)
class ContextSplit:
    """Which of the trained tokens of a micro-batch this context-parallel rank has: T of T_all."""

    sequence_ids: torch.Tensor  # [T_all] int64, as in TrainedTokens; the same on all of these ranks
    places: torch.Tensor  # [T] int64, where this rank's tokens are among them


@dataclass(frozen=True)
class TrainedTokens:
    """Trained response tokens of a micro-batch, each [T] as the field of the same name of PaddedSequences."""

    sequence_ids: torch.Tensor  # [T] int64, which sequence the token belongs to
    targets: torch.Tensor
    advantages: torch.Tensor
    loss_weights: torch.Tensor
    rollout_log_probs: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    reference_support_ids: torch.Tensor | None = None  # [T, K]
    reference_anchor_log_mass: torch.Tensor | None = None
    reference_support_log_probs: torch.Tensor | None = None  # [T, K]
    solve_rates: torch.Tensor | None = None
    loss_statistics: torch.Tensor | None = None  # [T, n]
    target_advantages: torch.Tensor | None = None
    split: ContextSplit | None = None  # None: this rank has all tokens of its micro-batch
