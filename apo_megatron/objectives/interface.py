"""What a policy loss gets and gives: flat per-token tensors of the trained response tokens.

Every tensor is [T], T = response tokens of one micro-batch, each a real trained token: padding has
been dropped before. Losses return one value per token; the aggregation multiplies each by its weight
(1 / a denominator of the whole mini-batch) and sums, so no loss can depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.sequences import WholeSequences

# Per-token inputs that cost something and are computed only for a loss that declares them.
Need = Literal[
    "anchor",
    "reference_log_probs",
    "entropy_grad",
    "rollout_log_probs",
    "whole_sequences",
    "reference_topk",  # log pi_ref and log pi_theta at the reference's Top-K (apo_topk), on all tokens
    "policy_topk",  # log pi_theta at its own Top-K, PolicyLossSpec.policy_topk of them
    "solve_rates",
    "target_advantages",
]


@dataclass(frozen=True)
class LossInputs:
    """Per-token inputs, each [T] fp32 unless said otherwise. The optional ones follow declared needs.

    Where A >= 0 no reference exists: ``reference_anchor_log_mass`` and ``reference_log_probs`` may be
    NaN there, ``anchor_log_mass`` -inf. Select with ``torch.where``; never multiply by a mask.
    """

    log_probs: Tensor  # grad; log pi_theta(y) at temperature T
    old_log_probs: Tensor
    advantages: Tensor
    entropy: Tensor  # grad only where "entropy_grad" is needed
    sequence_ids: Tensor  # int64, which sequence of the micro-batch the token belongs to
    anchor_log_mass: Tensor | None = None  # grad; log P over the anchor support S; -inf where S is empty
    reference_anchor_log_mass: Tensor | None = None  # log Z over S; -inf where S is empty
    reference_log_probs: Tensor | None = None  # log pi_ref(y)
    rollout_log_probs: Tensor | None = None  # log pi_rollout(y), as the engine reported it
    sampled_in_support: Tensor | None = None  # [T] bool, y in M; means something only where A < 0
    sequences: WholeSequences | None = None  # for what ``sequences.py`` says of a token's whole sequence
    # [T, K], by descending pi_ref, with y where it is among them; both -inf beyond the vocabulary.
    reference_topk_log_probs: Tensor | None = None  # log pi_ref of its K likeliest tokens
    log_probs_at_reference_topk: Tensor | None = None  # grad; log pi_theta of the same tokens
    # [T, K], grad; log pi_theta of its own K likeliest tokens, descending; -inf beyond the vocabulary
    policy_topk_log_probs: Tensor | None = None
    sampled_is_likeliest: Tensor | None = None  # [T] bool, y is the first of the policy's Top-K
    solve_rates: Tensor | None = None  # share of right answers to the prompt of the token
    statistics: dict[str, Tensor] = field(default_factory=dict)  # what the loss's BatchStatistics found
    target_advantages: Tensor | None = None  # of the sample, beside A (target_advantages.py)


@dataclass(frozen=True)
class TokenMetric:
    """A named metric as per-token values, reduced over the whole mini-batch (``diagnostics.py``)."""

    values: Tensor  # [T] float or bool; may be anything outside the mask
    mask: Tensor | None = None  # [T] bool, tokens that count; None = all
    # sum: of shares that were weighted before; max: the largest value (not negative), to 2.4 %
    reduction: Literal["mean", "sum", "max"] = "mean"
    quantiles: bool = False  # also report 5, 50, 95 % and the maximum; values must not be negative


@dataclass(frozen=True)
class LossOutputs:
    loss: Tensor  # [T], to be minimised
    metrics: dict[str, TokenMetric] = field(default_factory=dict)
    # [T], a term of the mini-batch's loss as it is: neither weighted by the aggregation nor corrected.
    unweighted: Tensor | None = None


PolicyLoss = Callable[[LossInputs, ObjectiveConfig], LossOutputs]


@dataclass(frozen=True)
class MiniBatchInputs:
    """This data-parallel rank's part of a mini-batch, as it is before the update: T tokens of B sequences.

    Sequences are whole, whichever ranks and micro-batches share their tokens. Floats are fp64. The two
    functions are collective: every rank calls them in the same order, also one without a token.
    """

    log_probs: Tensor  # [T] log pi_theta(y) under the weights that the update starts from
    old_log_probs: Tensor  # [T]
    advantages: Tensor  # [T]
    sequence_ids: Tensor  # [T] int64 in [0, B), ascending
    draw_seeds: Tensor  # [B] int64, the same for a sequence in every layout, another in every step
    groups: Tensor  # [B] int64, the same for all samples of a prompt and for no others; -1 where unknown
    sum: Callable[[Tensor], Tensor]  # over the data-parallel ranks
    gather: Callable[[Tensor], Tensor]  # [n] -> [n of all data-parallel ranks], one after the other


@dataclass(frozen=True)
class BatchStatistics:
    """What a loss must know of the whole mini-batch: found by one more pass without gradients, before the
    update, and handed to the loss as ``LossInputs.statistics``."""

    names: tuple[str, ...]
    compute: Callable[[MiniBatchInputs, ObjectiveConfig], dict[str, Tensor]]  # [T] for each of the names
