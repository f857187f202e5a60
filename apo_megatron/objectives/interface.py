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

# Per-token inputs that cost something and are computed only for a loss that declares them.
Need = Literal["anchor", "reference_log_probs", "entropy_grad", "rollout_log_probs", "target_advantages"]


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


PolicyLoss = Callable[[LossInputs, ObjectiveConfig], LossOutputs]
