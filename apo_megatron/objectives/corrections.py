"""What the policy loss of a token is multiplied by, given rho = pi_old / pi_rollout (docs/objective.md).

A correction is a function of rho [T], the settings and, where it declares that need, the whole sequences; a
new one is a function here, a line in the registry with the fields that it reads, and a name in
``ObjectiveConfig.mismatch_correction``.

The off-policy mask looks at something else, how far pi_theta has moved from pi_rollout since and in which
direction, so it is no choice among them but a switch of its own that goes with any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, Need
from apo_megatron.objectives.ratios import log_importance_ratio
from apo_megatron.objectives.sequences import WholeSequences, sequence_mean


@dataclass(frozen=True)
class CorrectedTokens:
    """What a correction makes of rho."""

    weights: Tensor  # [T]; 0: the token is masked
    is_changed: Tensor  # [T] bool; rho was truncated or masked


Correction = Callable[[Tensor, ObjectiveConfig, WholeSequences | None], CorrectedTokens]


@dataclass(frozen=True)
class CorrectionSpec:
    """A correction and its declared needs."""

    function: Correction
    needs: frozenset[Need] = frozenset({"rollout_log_probs"})
    reads: frozenset[str] = frozenset()  # fields of ``objective``


def no_correction(ratio: Tensor, cfg: ObjectiveConfig, sequences: WholeSequences | None) -> CorrectedTokens:
    """1 for every token."""
    return CorrectedTokens(torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool))


def tis(ratio: Tensor, cfg: ObjectiveConfig, sequences: WholeSequences | None) -> CorrectedTokens:
    """min(rho, tis_cap): truncated importance sampling (https://fengyao.notion.site/off-policy-rl). [code]"""
    return CorrectedTokens(ratio.clamp(max=cfg.tis_cap), ratio > cfg.tis_cap)


def icepop(ratio: Tensor, cfg: ObjectiveConfig, sequences: WholeSequences | None) -> CorrectedTokens:
    """rho where icepop_low <= rho <= icepop_high, else 0 (IcePop, arXiv 2510.18855). [code]"""
    is_masked = (ratio < cfg.icepop_low) | (ratio > cfg.icepop_high)
    return CorrectedTokens(torch.where(is_masked, 0.0, ratio), is_masked)


def seq_mask_tis(ratio: Tensor, cfg: ObjectiveConfig, sequences: WholeSequences | None) -> CorrectedTokens:
    """rho of the token itself where its geometric mean over the answer lies within seq_mask_low and
    seq_mask_high, else 0: whole answers are dropped (NeMo-RL, OpenRLHF). [code]
    """
    assert sequences is not None
    mean = sequence_mean(ratio.log(), sequences).exp()
    is_masked = (mean < cfg.seq_mask_low) | (mean > cfg.seq_mask_high)
    return CorrectedTokens(torch.where(is_masked, 0.0, ratio), is_masked)


MISMATCH_CORRECTIONS: dict[str, CorrectionSpec] = {
    "none": CorrectionSpec(no_correction, needs=frozenset()),
    "tis": CorrectionSpec(tis, reads=frozenset({"tis_cap"})),
    "icepop": CorrectionSpec(icepop, reads=frozenset({"icepop_low", "icepop_high"})),
    "seq_mask_tis": CorrectionSpec(
        seq_mask_tis,
        needs=frozenset({"rollout_log_probs", "whole_sequences"}),
        reads=frozenset({"seq_mask_low", "seq_mask_high"}),
    ),
}
OFF_POLICY_MASK_NEEDS: frozenset[Need] = frozenset({"rollout_log_probs", "whole_sequences"})


@torch.no_grad()
def off_policy_masked(inputs: LossInputs, threshold: float) -> Tensor:
    """Which tokens the off-policy mask of DeepSeek-V3.2 drops (arXiv 2512.02556), [T] bool. [code]

    Those of answers with A < 0 whose mean of log pi_rollout(y) - log pi_theta(y), each held within +-20, is
    above ``threshold`` nats: what the policy has left behind, or never said itself. From pi_rollout, as in
    TRL, so that it sees the engine's mismatch and stale weights, too.
    """
    assert inputs.rollout_log_probs is not None and inputs.sequences is not None
    gap = log_importance_ratio(inputs.rollout_log_probs, inputs.log_probs)
    return (inputs.advantages < 0) & (sequence_mean(gap, inputs.sequences) > threshold)
