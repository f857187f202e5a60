"""What the policy loss of a token is multiplied by, given rho = pi_old / pi_rollout (docs/objective.md).

A correction is a function of rho [T] and the settings; a new one is a function here, a line in the registry
and a name in ``ObjectiveConfig.mismatch_correction``. It sees one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig


@dataclass(frozen=True)
class CorrectedTokens:
    """What a correction makes of rho."""

    weights: Tensor  # [T]; 0: the token is masked
    is_changed: Tensor  # [T] bool; rho was truncated or masked


Correction = Callable[[Tensor, ObjectiveConfig], CorrectedTokens]


def no_correction(ratio: Tensor, cfg: ObjectiveConfig) -> CorrectedTokens:
    """1 for every token."""
    return CorrectedTokens(torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool))


def tis(ratio: Tensor, cfg: ObjectiveConfig) -> CorrectedTokens:
    """min(rho, tis_cap): truncated importance sampling (https://fengyao.notion.site/off-policy-rl). [code]"""
    return CorrectedTokens(ratio.clamp(max=cfg.tis_cap), ratio > cfg.tis_cap)


def icepop(ratio: Tensor, cfg: ObjectiveConfig) -> CorrectedTokens:
    """rho where icepop_low <= rho <= icepop_high, else 0 (IcePop, arXiv 2510.18855). [code]"""
    is_masked = (ratio < cfg.icepop_low) | (ratio > cfg.icepop_high)
    return CorrectedTokens(torch.where(is_masked, 0.0, ratio), is_masked)


MISMATCH_CORRECTIONS: dict[str, Correction] = {"none": no_correction, "tis": tis, "icepop": icepop}
