"""Importance ratio, anchor ratio and their rectified combination (APO, arXiv 2602.05717).

Shapes are free ([...] -> [...], usually [T]); dtypes follow the inputs. Where a value leaves the range
of its dtype the gradient is 0, never NaN: torch multiplies an incoming zero with ``exp``'s own result,
and 0 * inf is NaN. So the argument of ``exp`` is replaced before, and the result selected after (two
``torch.where``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(20) = 4.9e8 is far outside every clip range; beyond it lies overflow, not information.
MAX_LOG_RATIO = 20.0


def log_importance_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """log r = log_probs - old_log_probs, [...] -> [...], held within +-20 as in ``importance_ratio``."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def importance_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """r = pi_theta(y) / pi_old(y) = exp(log_probs - old_log_probs), [...] -> [...].

    The log ratio is held within +-20 (the field's custom), so r lies in [2.1e-9, 4.9e8] and the loss of a
    wrong token, which has no upper clip without dual clip, stays finite. Outside, the gradient is 0.
    """
    return log_importance_ratio(log_probs, old_log_probs).exp()


def anchor_ratio(anchor_log_mass: Tensor, reference_anchor_log_mass: Tensor) -> Tensor:
    """a = P / Z = exp(log P - log Z), [...] -> [...]; da = a * d log P.

    P and Z are the masses of pi_theta and pi_ref on the anchor support S. There is no floor on Z: a is what
    the formula says, inf where exp overflows (with gradient 0: r~ is then -inf and the surrogate flat).
    Where S is empty (both logs -inf) a = 0 with gradient 0. A missing reference (NaN) gives NaN, with a
    clean gradient, so that it can be deselected afterwards.
    """
    log_ratio = anchor_log_mass - reference_anchor_log_mass
    is_regular = log_ratio < math.log(torch.finfo(log_ratio.dtype).max)  # false for NaN, too
    regular = torch.where(is_regular, log_ratio, 0.0).exp()
    is_empty = torch.isneginf(anchor_log_mass) & torch.isneginf(reference_anchor_log_mass)
    irregular = log_ratio.detach().exp().masked_fill(is_empty, 0.0)
    return torch.where(is_regular, regular, irregular)


def rectified_ratio(
    ratio: Tensor, anchor_ratio: Tensor, advantages: Tensor, push_coeff: float, pull_coeff: float
) -> Tensor:
    """r~ = push_coeff * r - pull_coeff * a where A < 0, r where A >= 0; all [...].

    ``anchor_ratio`` is not looked at where A >= 0 (it may be NaN there), nor anywhere with ``pull_coeff`` 0,
    so that push 1, pull 0 is the ratio itself, bit for bit, whatever the anchor ratio is.
    """
    is_wrong = advantages < 0
    pushed = torch.where(is_wrong, push_coeff * ratio, ratio)
    if pull_coeff == 0:  # 0 * inf
        return pushed
    return pushed - torch.where(is_wrong, pull_coeff * anchor_ratio, 0.0)
