"""Advantages whose objective is the best of k samples instead of one.

[P, G] rewards, n judged samples in a group, C(n, k) subsets of k. All quotients of binomials are taken from
their logarithms in float64, so n may be in the thousands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.objectives.advantages import mixed_groups


def passk_advantages(rewards: Tensor, is_correct: Tensor, k: int) -> Tensor:
    """Pass@k training, analytic (arXiv 2508.10751), [P, G], [P, G] bool -> [P, G].

    Of all subsets of k samples, each with reward 1 where it holds a right one, b = 1 - q have reward 1, with
    q = C(n - c, k) / C(n, k) and c right samples. A sample gets the mean over its subsets of
    (reward - b) / sqrt(b q):

        right: sqrt(q / b)      wrong: -c / (n - c) * sqrt(q / b)

    (from the paper's (b - 1 + C(n-c-1, k-1) / C(n-1, k-1)) with C(n-c-1, k-1) / C(n-1, k-1) = q n / (n - c)).
    It sums to 0 in each group. Where no subset or every one holds a right sample (c = 0, c > n - k) all are
    0. k = 1 is GRPO with the std of divisor n.
    """
    is_judged = ~rewards.isnan()
    num_judged = is_judged.sum(dim=1, keepdim=True).double()
    num_correct = (is_correct & is_judged).sum(dim=1, keepdim=True).double()
    num_wrong = num_judged - num_correct
    log_all_wrong = _log_binomial(num_wrong, k) - _log_binomial(num_judged, k)  # log q
    has_signal = is_judged & (num_correct > 0) & (num_wrong >= k)
    log_all_wrong = torch.where(has_signal, log_all_wrong, -1.0)  # any number below 0
    right = (log_all_wrong.exp() / -log_all_wrong.expm1()).sqrt()
    wrong = -num_correct / num_wrong.clamp(min=1) * right
    return torch.where(has_signal, torch.where(is_correct, right, wrong), 0.0).to(rewards.dtype)


def pkpo_advantages(rewards: Tensor, k: int) -> Tensor:
    """PKPO, leave-one-out minus one (arXiv 2505.15201): any rewards, [P, G] -> [P, G], never negative.

    A_i = n / k * s_i with s_i = 1 / C(n, k) * sum over the subsets I of k samples that hold i of
    (max of I - max of I without i), an unbiased estimator of the gradient of the expected best of k; the
    factor n / k, which the paper does not have, gives A the scale of R. With the rewards in ascending order,
    g_1 <= ... <= g_n, only subsets whose largest is i count, and

        A_i = sum over m < i of (g_(m+1) - g_m) * C(m, k - 1) / C(n - 1, k - 1)

    (our rearrangement: nothing cancels, equal rewards get equal advantages). With g_0 = 0 and the sum from
    m = 0, k = 1 gives R. Groups of fewer than k judged samples get 0; for right and wrong answers it is
    C(n - c, k - 1) / C(n - 1, k - 1) where right, else 0.
    """
    group_size = rewards.shape[1]
    is_judged = ~rewards.isnan()
    num_judged = is_judged.sum(dim=1, keepdim=True)
    ascending, order = rewards.double().sort(dim=1)  # NaN last
    gaps = ascending.diff(dim=1, prepend=torch.zeros_like(ascending[:, :1]))
    num_below = torch.arange(group_size, dtype=torch.float64, device=rewards.device)  # m
    log_shares = _log_binomial(num_below, k - 1) - _log_binomial((num_judged - 1).double(), k - 1)
    counts = is_judged.gather(1, order) & (num_below >= k - 1) & (num_judged >= k)
    steps = torch.where(counts, gaps * torch.where(counts, log_shares, 0.0).exp(), 0.0)
    advantages = torch.zeros_like(ascending).scatter(1, order, steps.cumsum(dim=1))
    # Without a baseline (k = 1) groups of equal rewards have a signal; else their rounding must be none.
    has_signal = is_judged if k == 1 else is_judged & mixed_groups(rewards).unsqueeze(1)
    return torch.where(has_signal, advantages, 0.0).to(rewards.dtype)


def _log_binomial(n: Tensor, k: int) -> Tensor:
    """log C(n, k) [...] float64; n < k is not asked for, and gives some number or inf."""
    k_ = torch.tensor(float(k), dtype=torch.float64)
    return (n + 1).lgamma() - (k_ + 1).lgamma() - (n - k + 1).lgamma()
