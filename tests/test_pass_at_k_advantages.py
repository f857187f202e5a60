"""Advantages on Pass@k: reductions, closed forms, expectations, large groups against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from apo_megatron.objectives import group_normalized_advantages
from apo_megatron.objectives.pass_at_k_advantages import passk_advantages, pkpo_advantages

NAN = math.nan


def test_passk_of_1_is_grpo_with_the_other_std() -> None:
    correct = torch.tensor(
        [[1, 0, 0, 1, 1], [0, 0, 1, NAN, 0], [NAN, 1, 0, NAN, NAN], [1, 1, 1, 1, 1], [NAN] * 5]
    ).double()
    num_judged = (~correct.isnan()).sum(dim=1, keepdim=True).clamp(min=2)
    grpo = group_normalized_advantages(correct, eps=0.0).nan_to_num()  # 0 / 0 where nothing differs
    expected = grpo * (num_judged / (num_judged - 1)).sqrt()
    torch.testing.assert_close(passk_advantages(correct, correct >= 1, 1), expected)


def test_passk_as_the_paper_writes_it() -> None:
    n, k = 8, 3
    for c in range(1, n - k + 1):
        b = 1 - math.comb(n - c, k) / math.comb(n, k)
        s = math.sqrt(b * (1 - b))
        right, wrong = (1 - b) / s, (1 - b - math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)) / s
        rewards = torch.tensor([[1.0] * c + [0.0] * (n - c)], dtype=torch.float64)
        expected = torch.tensor([[right] * c + [wrong] * (n - c)], dtype=torch.float64)
        torch.testing.assert_close(passk_advantages(rewards, rewards >= 1, k), expected)
    for c in (0, n - k + 1, n):  # no subset without a right one, or none with one
        rewards = torch.tensor([[1.0] * c + [0.0] * (n - c)])
        assert (passk_advantages(rewards, rewards >= 1, k) == 0).all()


def test_pkpo_of_1_is_the_reward() -> None:
    rewards = torch.tensor([[0.3, -0.2, NAN, 0.3], [0.7, 0.7, 0.7, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(pkpo_advantages(rewards, 1), rewards.nan_to_num())


def test_pkpo_of_the_whole_group_rewards_the_best() -> None:
    rewards = torch.tensor([[0.2, 0.9, 0.4, 0.1], [0.3, 0.8, 0.8, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(pkpo_advantages(rewards, 4), expected)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_pkpo_of_right_and_wrong_in_closed_form(k: int) -> None:
    n = 6
    for c in range(n + 1):
        rewards = torch.tensor([[1.0] * c + [0.0] * (n - c)], dtype=torch.float64)
        right = math.comb(n - c, k - 1) / math.comb(n - 1, k - 1) if c else 0.0
        torch.testing.assert_close(pkpo_advantages(rewards, k), rewards * right)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_pkpo_estimates_the_gradient_of_the_expected_best_without_bias(k: int) -> None:
    """Samples from softmax(theta) over four answers; the expectation over all groups is taken exactly."""
    n, values = 4, torch.tensor([0.0, 0.3, 0.3, 1.0], dtype=torch.float64)
    theta = torch.tensor([0.2, -0.4, 0.1, -0.9], dtype=torch.float64, requires_grad=True)
    probs = theta.softmax(0)
    best = sum(probs[list(draw)].prod() * values[list(draw)].max() for draw in product(range(4), repeat=k))
    (expected,) = torch.autograd.grad(torch.as_tensor(best), theta)
    groups = torch.tensor(list(product(range(4), repeat=n)))
    weights = probs.detach()[groups].prod(dim=1)
    scores = torch.eye(4, dtype=torch.float64)[groups] - probs.detach()  # d log pi / d theta
    advantages = pkpo_advantages(values[groups], k)
    found = (weights[:, None, None] * advantages.unsqueeze(-1) * scores).sum(dim=(0, 1)) * k / n
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1024, 512), (1024, 2), (4096, 16)])
def test_large_groups_against_exact_fractions(n: int, k: int, dtype: torch.dtype) -> None:
    counts = [0, 1, 2, n // 2 - 1, n // 2, n // 2 + 1, n - k, n - k + 1, n - 1, n]
    rewards = torch.stack([torch.arange(n) < c for c in counts]).to(dtype)
    passk, pkpo = passk_advantages(rewards, rewards >= 1, k), pkpo_advantages(rewards, k)
    assert passk.isfinite().all() and pkpo.isfinite().all()
    rtol = 1e-9 if dtype == torch.float64 else 1e-6
    for row, c in enumerate(counts):
        all_wrong = Fraction(math.comb(n - c, k), math.comb(n, k))
        has_signal = 0 < all_wrong < 1
        right = math.sqrt(all_wrong / (1 - all_wrong)) if has_signal else 0.0
        wrong = -c / (n - c) * right if has_signal else 0.0
        best = float(Fraction(math.comb(n - c, k - 1), math.comb(n - 1, k - 1))) if c else 0.0
        smallest = float(np.finfo(np.float32).tiny)
        for found, expected in ((passk[row, 0], right if c else wrong), (pkpo[row, 0], best)):
            assert found.item() == pytest.approx(expected, rel=rtol, abs=smallest)
        if 0 < c < n:
            assert passk[row, -1].item() == pytest.approx(wrong, rel=rtol, abs=smallest)
            assert pkpo[row, -1].item() == 0.0
