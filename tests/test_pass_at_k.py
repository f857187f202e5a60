"""The unbiased estimator against enumeration and rational arithmetic."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from apo_megatron.evaluation import pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_equals_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(n - c, k), comb(n, k))


@pytest.mark.parametrize("n", range(1, 13))
def test_equals_rational_arithmetic_for_all_small_counts(n: int) -> None:
    correct, ks = np.arange(n + 1), np.arange(1, n + 1)
    curves = pass_at_k(n, correct[:, None], ks)
    assert isinstance(curves, np.ndarray) and curves.shape == (n + 1, n)
    expected = [[float(exact(n, c, k)) for k in ks.tolist()] for c in correct.tolist()]
    np.testing.assert_allclose(curves, expected, atol=4e-16, rtol=0)


def test_large_counts_agree_with_rational_arithmetic() -> None:
    rng = np.random.default_rng(0)
    correct = np.concatenate([[0, 1, 2, 30, 5_000, 9_999, 10_000], rng.integers(0, 300, 13)])
    ks = np.concatenate([[1, 2, 5_000, 9_999, 10_000], rng.integers(1, 3_000, 10)])
    curves = pass_at_k(10_000, correct[:, None], ks)
    expected = [[float(exact(10_000, c, k)) for k in ks.tolist()] for c in correct.tolist()]
    np.testing.assert_allclose(curves, expected, atol=1e-12, rtol=0)
    assert 0.1 < np.mean((curves > 0.01) & (curves < 0.99))  # not only ends


def test_ends_are_exact() -> None:
    assert pass_at_k(256, 0, 256) == 0.0
    assert pass_at_k(256, 1, 256) == 1.0
    assert pass_at_k(256, 250, 7) == 1.0  # every subset of 7 holds a right sample
    assert pass_at_k(256, 64, 1) == 0.25


def test_arrays_broadcast_and_integers_give_a_float() -> None:
    correct = np.array([0, 1, 5, 16])
    curve = pass_at_k(16, correct[:, None], np.array([1, 4, 16]))
    assert isinstance(curve, np.ndarray) and curve.shape == (4, 3)
    for i, c in enumerate(correct):
        for j, k in enumerate((1, 4, 16)):
            assert curve[i, j] == pass_at_k(16, int(c), k)
    assert type(pass_at_k(16, 5, 4)) is float
    np.testing.assert_array_equal(pass_at_k(np.array([4, 8]), [1, 2], 4), [1.0, pass_at_k(8, 2, 4)])
    assert np.shape(pass_at_k(np.array([], dtype=int), np.array([], dtype=int), 4)) == (0,)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 5, 1, "num_correct"),
        (4, -1, 1, "num_correct"),
        (4, 2, 5, "k must be"),
        (4, 2, 0, "k must be"),
        (np.array([8, 4]), np.array([1, 1]), 8, r"k must be .*found k=8, num_samples=4 at index \(1,\)"),
        (4, 2.5, 1, "integer"),
    ],
)
def test_impossible_counts_are_refused(n: object, c: object, k: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)  # type: ignore[call-overload]


def test_estimate_is_unbiased() -> None:
    # n = 16 draws of a problem solved with probability p: E[pass_at_k] = 1 - (1 - p)^k
    p, k = 0.15, 8
    num_correct = np.random.default_rng(0).binomial(16, p, size=200_000)
    assert np.mean(pass_at_k(16, num_correct, k)) == pytest.approx(1 - (1 - p) ** k, abs=2e-3)


def test_memory_is_bounded_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = np.random.default_rng(3).integers(0, 301, 20)[:, None]
    ks = np.array([1, 7, 100, 300])
    expected = pass_at_k(300, correct, ks)
    monkeypatch.setattr(sys.modules["apo_megatron.evaluation.pass_at_k"], "_CHUNK", 100)  # one factor a time
    np.testing.assert_allclose(pass_at_k(300, correct, ks), expected, atol=1e-14, rtol=0)


def test_importing_the_estimator_is_light() -> None:
    code = "import sys, apo_megatron.evaluation; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
