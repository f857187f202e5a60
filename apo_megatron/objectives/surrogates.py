"""The clipped surrogate of PPO (arXiv 1707.06347), with asymmetric bounds and the dual clip.

Bounds are numbers or, for a range of each token's own, tensors of the ratio's shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None = None,
) -> Tensor:
    """Loss per token: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), [...] -> [...].

    ``dual_clip`` bounds it by -A * dual_clip where A < 0 (arXiv 1912.09729). It is computed as -A times the
    ratio clipped on the side that the maximum looks at, which is the same number: r <= 1 + clip_high for
    A >= 0, r >= 1 - clip_low (and r <= dual_clip) for A < 0. Clipped tokens have gradient 0, also at
    r = +-inf; tokens with A = 0 have loss 0 and gradient 0.
    """
    wrong = ratio.clamp(min=1 - clip_low)
    if dual_clip is not None:
        wrong = wrong.clamp(max=dual_clip)
    return -advantages * torch.where(advantages < 0, wrong, ratio.clamp(max=1 + clip_high))


@dataclass(frozen=True)
class ClippedTokens:
    """Which tokens lie outside the range on the side that counts for them, each [...] bool."""

    low: Tensor  # A < 0, ratio < 1 - clip_low
    high: Tensor  # A > 0, ratio > 1 + clip_high
    dual: Tensor | None  # A < 0, ratio > dual_clip; None without a dual clip


@torch.no_grad()
def clipped_tokens(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | Tensor | None = None,
) -> ClippedTokens:
    """The tokens that ``clipped_surrogate`` of the same arguments gives no gradient."""
    is_wrong = advantages < 0
    return ClippedTokens(
        low=is_wrong & (ratio < 1 - clip_low),
        high=(advantages > 0) & (ratio > 1 + clip_high),
        dual=None if dual_clip is None else is_wrong & (ratio > dual_clip),
    )
