"""Estimators of KL(pi_theta || pi_ref) from the sampled token, y ~ pi_theta.

With d = log_probs - reference_log_probs per token ([...] -> [...]). As a *loss* they differ by what their
gradient is in expectation, not by the value they estimate:

- k1 estimates without bias, but its gradient is the score itself, whose expectation is 0: noise, no pull.
- k2 has the gradient d * score, in expectation that of KL(pi_theta || pi_ref).
- k3 estimates without bias and with little variance; its gradient is (1 - pi_ref / pi_theta) * score, in
  expectation that of the other direction, KL(pi_ref || pi_theta).

See J. Schulman, "Approximating KL Divergence" (2020), for the values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apo_megatron.objectives.ratios import MAX_LOG_RATIO

KLEstimator = Callable[[Tensor, Tensor], Tensor]


def kl_k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k1 = d. Any sign."""
    return log_probs - reference_log_probs


def kl_k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k2 = d^2 / 2 >= 0."""
    return (log_probs - reference_log_probs).square() / 2


def kl_k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k3 = exp(-d) + d - 1 >= 0, by expm1, which keeps the digits of a small d.

    d is held above -20 (k3 = 4.9e8, gradient 0 beyond), where exp(-d) would run into overflow.
    """
    difference = (log_probs - reference_log_probs).clamp(min=-MAX_LOG_RATIO)
    return torch.expm1(-difference) + difference


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
