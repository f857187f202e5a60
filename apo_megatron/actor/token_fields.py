"""What a pass found for every trained token, as fields of the sequences."""

from __future__ import annotations

import math

from torch import Tensor

from apo_megatron.objectives.interface import TokenMetric
from apo_megatron.objectives.kl import kl_k3
from apo_megatron.objectives.objective import Objective
from apo_megatron.types import PaddedSequences


def at_tokens(values: Tensor, mask: Tensor, fill: float) -> Tensor:
    """[T, ...] per-token ``values`` put where ``mask`` [B, S] is set, ``fill`` elsewhere: [B, S, ...]."""
    result = values.new_full((*mask.shape, *values.shape[1:]), fill)
    result[mask] = values
    return result


def reference_fields(results: dict[str, Tensor], mask: Tensor, objective: Objective) -> dict[str, Tensor]:
    """The reference fields [B, S, ...] that ``objective`` needs, from ``results`` at the tokens of ``mask``.

    Elsewhere the log values are NaN and the ids -1.
    """
    kept: dict[str, tuple[str, float]] = {}
    if objective.needs_reference_log_probs:
        kept["reference_log_probs"] = "log_probs", math.nan
    if objective.needs_support:
        kept["reference_support_ids"] = "support_ids", -1
        kept["reference_anchor_log_mass"] = "anchor_log_mass", math.nan
    if objective.needs_support_log_probs:
        kept["reference_support_log_probs"] = "support_log_probs", math.nan
    return {field: at_tokens(results[name], mask, fill) for field, (name, fill) in kept.items()}


def reference_metrics(results: dict[str, Tensor], sequences: PaddedSequences) -> dict[str, TokenMetric]:
    """What the reference pass alone can tell, on tokens with A < 0, so that nothing of it need be kept.

    ``kl_old_to_reference``: k3 of KL(pi_old || pi_ref), of the policy that drew the samples.
    """
    mask = sequences.loss_mask
    is_wrong = sequences.advantages[mask] < 0
    metrics = {}
    if sequences.old_log_probs is not None:
        kl = kl_k3(sequences.old_log_probs[mask], results["log_probs"])
        metrics["kl_old_to_reference"] = TokenMetric(kl, is_wrong)
    if "coverage" in results:
        metrics["support_coverage_reference"] = TokenMetric(results["coverage"], is_wrong)
    return metrics
