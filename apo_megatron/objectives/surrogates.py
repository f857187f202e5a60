"""The clipped surrogate of PPO (arXiv 1707.06347), with asymmetric bounds and the dual clip."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """Loss per token: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), [...] -> [...].

    ``dual_clip`` bounds it by -A * dual_clip where A < 0 (arXiv 1912.09729). It is computed as -A times the
    ratio clipped on the side that the maximum looks at, which is the same number: r <= 1 + clip_high for
    A >= 0, r >= 1 - clip_low (and r <= dual_clip) for A < 0. Clipped tokens have gradient 0, also at
    r = +-inf; tokens with A = 0 have loss 0 and gradient 0.
    """
    bounded = torch.where(
        advantages < 0, ratio.clamp(min=1 - clip_low, max=dual_clip), ratio.clamp(max=1 + clip_high)
    )
    return -advantages * bounded
