"""The unbiased estimator against enumeration, and the bootstrap against what is known in closed form."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from apo_megatron.evaluation import pass_at_k
from apo_megatron.evaluation.pass_at_k import bootstrap_interval, paired_bootstrap_difference


@pytest.mark.parametrize("n", range(1, 8))
def test_equals_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        right = [i < c for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_large_counts_agree_with_exact_arithmetic() -> None:
    for n, c, k in [(256, 1, 1), (256, 1, 256), (256, 3, 32), (1024, 7, 512), (10_000, 2, 5_000)]:
        expected = float(1 - Fraction(comb(n - c, k), comb(n, k)))
        assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


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
        (np.array([8, 4]), np.array([1, 1]), 8, "k must be"),
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


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values, num_resamples=4000, seed=3)
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.003)
    narrow_low, narrow_high = bootstrap_interval(values, 4000, seed=3, level=0.5)
    assert low < narrow_low < values.mean() < narrow_high < high
    assert bootstrap_interval(np.ones(5), 100, seed=0) == (1.0, 1.0)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(rng.random(100) < 0.3, num_resamples=400, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_bootstrap_repeats_with_its_seed_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(50)
    expected = bootstrap_interval(values, 500, seed=7)
    assert expected == bootstrap_interval(values, 500, seed=7)
    assert expected != bootstrap_interval(values, 500, seed=8)
    monkeypatch.setattr(sys.modules["apo_megatron.evaluation.pass_at_k"], "_CHUNK", 120)
    assert expected == bootstrap_interval(values, 500, seed=7)


def test_paired_difference_ignores_the_spread_between_problems() -> None:
    rng = np.random.default_rng(5)
    difficulty = rng.random(200)
    a, b = difficulty + 0.05 + 0.01 * rng.standard_normal(200), difficulty
    difference, low, high = paired_bootstrap_difference(a, b, num_resamples=1000, seed=0)
    assert difference == pytest.approx(0.05, abs=0.003)
    assert low < difference < high and high - low < 0.005
    alone_low, alone_high = bootstrap_interval(a, 1000, seed=0)
    assert alone_high - alone_low > 10 * (high - low)


def test_bad_bootstrap_input_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        bootstrap_interval([], 10, seed=0)
    with pytest.raises(ValueError, match="num_resamples"):
        bootstrap_interval([1.0], 0, seed=0)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0], 10, seed=0, level=95)
    with pytest.raises(ValueError, match="same problems"):
        paired_bootstrap_difference([1.0, 0.0], [1.0], 10, seed=0)


def test_importing_the_estimator_is_light() -> None:
    code = "import sys, apo_megatron.evaluation; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
