"""Ratios, surrogate and KL estimators in float64 against plain formulas, autograd and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from apo_megatron.objectives import (
    anchor_ratio,
    clipped_surrogate,
    importance_ratio,
    kl_k1,
    kl_k2,
    kl_k3,
    rectified_ratio,
)

PUSH, PULL, LOW, HIGH = 1.05, 0.1, 0.2, 0.28


def leaf(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(output: Tensor, source: Tensor) -> Tensor:
    return torch.autograd.grad(output.sum(), source, retain_graph=True)[0]


def test_importance_ratio_and_its_gradient() -> None:
    log_probs, old = leaf(-1.0, -2.0, -0.5), vector(-1.5, -1.0, -0.5)
    ratio = importance_ratio(log_probs, old)
    expected = [math.exp(0.5), math.exp(-1.0), 1.0]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-14)
    assert gradient(ratio, log_probs).tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.autograd.gradcheck(importance_ratio, (log_probs, old))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_ratio_stays_finite(dtype: torch.dtype) -> None:
    log_probs = leaf(0.0, -1000.0, -math.inf, -5.0, dtype=dtype)
    old = torch.tensor([-1000.0, 0.0, -1.0, -5.0], dtype=dtype)
    ratio = importance_ratio(log_probs, old)
    expected = [math.exp(20), math.exp(-20), math.exp(-20), 1.0]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-5)
    assert gradient(ratio, log_probs).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_anchor_ratio_of_a_tiny_reference_mass_is_exact() -> None:
    log_mass, reference = leaf(math.log(1e-30), -1001.0, -3.0), vector(math.log(2e-30), -1000.0, -700.0)
    ratio = anchor_ratio(log_mass, reference)
    expected = [0.5, math.exp(-1.0), math.exp(697.0)]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-12)
    assert gradient(ratio, log_mass).tolist() == pytest.approx(expected, rel=1e-12)  # da = a d log P
    assert torch.autograd.gradcheck(anchor_ratio, (leaf(-1.0, -0.1), vector(-2.0, -0.05)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchor_ratio_at_the_edges_has_a_clean_gradient(dtype: torch.dtype) -> None:
    #                 S empty,  P = 0,     overflow, no reference, both unknown, theta = ref
    log_mass = leaf(-math.inf, -math.inf, -1.0, -1.0, math.nan, -4.0, dtype=dtype)
    reference = torch.tensor([-math.inf, -2.0, -1000.0, math.nan, math.nan, -4.0], dtype=dtype)
    ratio = anchor_ratio(log_mass, reference)
    assert ratio[[0, 1, 2, 5]].tolist() == [0.0, 0.0, math.inf, 1.0]
    assert ratio[[3, 4]].isnan().all()
    assert gradient(ratio, log_mass).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchor_ratio_around_the_largest_float(dtype: torch.dtype) -> None:
    limit = torch.tensor(math.log(torch.finfo(dtype).max), dtype=dtype)
    infinity = torch.full_like(limit, math.inf)
    log_mass = torch.stack([limit.nextafter(-infinity), limit, limit.nextafter(infinity)]).requires_grad_()
    ratio = anchor_ratio(log_mass, torch.zeros(3, dtype=dtype))
    assert ratio[0].isfinite() and ratio[2].isinf()
    assert gradient(ratio, log_mass).isfinite().all()


def test_rectified_ratio_and_its_gradient() -> None:
    ratio, anchor, advantages = leaf(0.9, 0.9, 0.9), leaf(1.3, 1.3, 1.3), vector(-0.5, 0.0, 2.0)
    rectified = rectified_ratio(ratio, anchor, advantages, PUSH, PULL)
    assert rectified.tolist() == pytest.approx([1.05 * 0.9 - 0.1 * 1.3, 0.9, 0.9], rel=1e-15)
    assert gradient(rectified, ratio).tolist() == [1.05, 1.0, 1.0]
    assert gradient(rectified, anchor).tolist() == [-0.1, 0.0, 0.0]


def test_rectified_ratio_does_not_look_at_the_anchor_of_right_tokens() -> None:
    ratio, anchor = leaf(0.9, 0.9), leaf(math.nan, math.inf)
    rectified = rectified_ratio(ratio, anchor, vector(1.0, 0.0), PUSH, PULL)
    assert rectified.tolist() == [0.9, 0.9]
    assert gradient(rectified, ratio).tolist() == [1.0, 1.0]
    assert gradient(rectified, anchor).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_push_one_pull_zero_is_the_ratio_itself(bad: float) -> None:
    ratio = torch.rand(8, dtype=torch.float32).requires_grad_()
    advantages = torch.tensor([-1.0, 1.0]).repeat(4)
    rectified = rectified_ratio(ratio, torch.full((8,), bad), advantages, 1.0, 0.0)
    assert torch.equal(rectified, ratio) and torch.equal(gradient(rectified, ratio), torch.ones(8))


def plain_surrogate(ratio: float, advantage: float, dual_clip: float | None) -> float:
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - LOW), 1 + HIGH))
    return min(loss, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else loss


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_surrogate_is_the_textbook_maximum(dual_clip: float | None) -> None:
    grid = [
        (r, a)
        for r in (-50.0, 0.0, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1, 1e9)
        for a in (-1.5, 0.0, 0.7)
    ]
    ratio, advantages = leaf(*(r for r, _ in grid)), vector(*(a for _, a in grid))
    loss = clipped_surrogate(ratio, advantages, LOW, HIGH, dual_clip)
    assert loss.tolist() == [plain_surrogate(r, a, dual_clip) for r, a in grid]
    step = 1e-4  # no grid point lies that close to a kink
    slopes = [
        (plain_surrogate(r + step, a, dual_clip) - plain_surrogate(r - step, a, dual_clip)) / (2 * step)
        for r, a in grid
    ]
    assert gradient(loss, ratio).tolist() == pytest.approx(slopes, abs=1e-2, rel=1e-6)


def test_surrogate_by_gradcheck() -> None:
    ratio, advantages = leaf(0.5, 0.9, 1.2, 1.5, 4.0), vector(-1.0, -0.3, 0.8, 0.8, -1.0)
    assert torch.autograd.gradcheck(lambda r: clipped_surrogate(r, advantages, LOW, HIGH, 3.0), (ratio,))


def test_surrogate_of_infinite_ratios() -> None:
    ratio = leaf(-math.inf, math.inf, math.inf, math.inf)
    advantages = vector(-2.0, 2.0, 0.0, -2.0)
    loss = clipped_surrogate(ratio, advantages, LOW, HIGH, dual_clip=3.0)
    assert loss.tolist() == [1.6, -2.56, 0.0, 6.0]
    assert gradient(loss, ratio).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_zero_advantage_gives_exactly_zero() -> None:
    ratio = leaf(0.1, 1.0, 50.0, math.inf)
    loss = clipped_surrogate(ratio, vector(0.0, 0.0, 0.0, 0.0), LOW, HIGH)
    assert loss.tolist() == [0.0] * 4 and gradient(loss, ratio).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overflowing_anchor_ratio_is_clipped_flat(dtype: torch.dtype) -> None:
    """The whole chain: log masses -> a = inf -> r~ = -inf -> a flat surrogate, without a NaN."""
    log_probs, log_mass = leaf(-1.0, dtype=dtype), leaf(-0.5, dtype=dtype)
    advantages = torch.tensor([-2.0], dtype=dtype)
    anchor = anchor_ratio(log_mass, torch.tensor([-1000.0], dtype=dtype))
    ratio = rectified_ratio(importance_ratio(log_probs, log_probs.detach()), anchor, advantages, PUSH, PULL)
    loss = clipped_surrogate(ratio, advantages, LOW, HIGH)
    assert loss.tolist() == pytest.approx([1.6])
    assert gradient(loss, log_probs).item() == 0.0 and gradient(loss, log_mass).item() == 0.0


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overflowing_importance_ratio(advantage: float, dtype: torch.dtype) -> None:
    log_probs, advantages = leaf(0.0, dtype=dtype), torch.tensor([advantage], dtype=dtype)
    loss = clipped_surrogate(
        importance_ratio(log_probs, torch.tensor([-800.0], dtype=dtype)), advantages, LOW, HIGH
    )
    expected = {-1.0: math.exp(20), 0.0: 0.0, 1.0: -(1 + HIGH)}[advantage]
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient(loss, log_probs).item() == 0.0


def test_kl_formulas_and_gradients() -> None:
    log_probs, reference = leaf(-1.0, -3.0, -0.2), vector(-1.4, -0.5, -0.2)
    d = (log_probs - reference).detach()
    for estimator, value, slope in (
        (kl_k1, d, torch.ones_like(d)),
        (kl_k2, d**2 / 2, d),
        (kl_k3, torch.exp(-d) + d - 1, 1 - torch.exp(-d)),
    ):
        kl = estimator(log_probs, reference)
        torch.testing.assert_close(kl, value, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(gradient(kl, log_probs), slope, rtol=1e-13, atol=1e-14)
        assert torch.autograd.gradcheck(estimator, (log_probs, reference))


def test_kl_k3_neither_overflows_nor_loses_small_differences() -> None:
    log_probs = leaf(-1000.0, 0.0, dtype=torch.float32)
    kl = kl_k3(log_probs, torch.tensor([0.0, -1e-4]))
    assert kl.tolist() == pytest.approx([math.expm1(20) - 20, 5e-9], rel=1e-3)
    assert gradient(kl, log_probs).tolist() == pytest.approx([0.0, 1e-4], rel=1e-3)


def test_kl_expectations_over_a_known_distribution() -> None:
    """Values and expected gradients summed over the whole vocabulary: what the module's docstring says."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    forward, reverse = (
        (probs * (log_probs - reference)).sum(),
        (reference.exp() * (reference - log_probs)).sum(),
    )
    for estimator, is_unbiased, expected_gradient in (
        (kl_k1, True, torch.zeros(7, dtype=torch.float64)),
        (kl_k2, False, gradient(forward, logits)),
        (kl_k3, True, gradient(reverse, logits)),
    ):
        kl = estimator(log_probs, reference)
        mean = (probs.detach() * kl).sum()  # samples are fixed: no gradient through their frequency
        assert (abs((mean - forward).item()) < 1e-12) is is_unbiased
        torch.testing.assert_close(gradient(mean, logits), expected_gradient, rtol=1e-10, atol=1e-12)
