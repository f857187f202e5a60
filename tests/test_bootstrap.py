"""Intervals over problems: against closed forms, and how often they cover the truth."""

from __future__ import annotations

from math import exp, lgamma
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from apo_megatron.evaluation import bootstrap, pass_at_k
from apo_megatron.evaluation.bootstrap import bootstrap_interval, t_quantile, two_way_interval


def test_many_even_values_give_the_normal_approximation() -> None:
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values, num_resamples=4000, seed=3)
    half_width = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.003)
    narrow_low, narrow_high = bootstrap_interval(values, 4000, seed=3, level=0.5)
    assert low < narrow_low < values.mean() < narrow_high < high


def test_few_problems_widen_the_interval_as_students_t_does() -> None:
    values = np.arange(12) - 5.5  # symmetric: neither bias nor skewness
    low, high = bootstrap_interval(values, num_resamples=200_000, seed=0)
    half_width = 2.201 * values.std(ddof=1) / np.sqrt(12)  # t with 11 degrees of freedom
    assert (-low, high) == pytest.approx((half_width, half_width), rel=0.04)


def test_a_long_tail_moves_the_interval_to_its_side() -> None:
    values = np.array([0.0] * 25 + [1.0] * 5)
    low, high = bootstrap_interval(values, 10_000, seed=0)
    assert high - values.mean() > 1.15 * (values.mean() - low)
    mirrored_low, mirrored_high = bootstrap_interval(1 - values, 10_000, seed=0)
    assert (mirrored_low, mirrored_high) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_it_is_bca_with_wider_percentiles() -> None:
    """Efron's formulas as a textbook has them (acceleration by the jackknife), on draws of its own."""
    values = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.02, 0.1, 0.3, 1.0])
    normal = NormalDist()
    draws = np.sort(np.random.default_rng(9).choice(values, (200_000, 10)).mean(axis=1))
    left_out = (values.sum() - values) / 9
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bias = normal.inv_cdf(np.mean(draws < values.mean()) + np.mean(np.isclose(draws, values.mean())) / 2)
    assert bias > 0.05 and acceleration > 0.05
    expected = []
    for z in (-2.262157 * np.sqrt(10 / 9), 2.262157 * np.sqrt(10 / 9)):  # t with 9 degrees of freedom
        level = normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        expected.append(draws[int(level * len(draws))])
    assert bootstrap_interval(values, 200_000, seed=0) == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("values", [[1.0], [0.1] * 7, np.ones(5)])
def test_equal_values_have_no_spread(values: Any) -> None:
    assert bootstrap_interval(values, 100, seed=0).tolist() == [values[0], values[0]]


@pytest.mark.parametrize("num_problems", [2, 3, 4])
def test_the_fewest_problems_stay_within_the_values(num_problems: int) -> None:
    values = np.eye(num_problems)[0]
    low, high = bootstrap_interval(values, 1000, seed=0)
    assert 0 <= low <= values.mean() <= high <= 1


def test_columns_are_drawn_together_and_each_as_if_alone() -> None:
    values = np.random.default_rng(2).random((50, 3))
    together = bootstrap_interval(values, 500, seed=1)
    assert together.shape == (3, 2)
    for column, interval in zip(values.T, together, strict=True):
        np.testing.assert_array_equal(bootstrap_interval(column, 500, seed=1), interval)
    np.testing.assert_array_equal(bootstrap_interval(values[:, :0], 500, seed=1), np.empty((0, 2)))


def test_it_repeats_with_its_seed_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(50)
    expected = bootstrap_interval(values, 500, seed=7).tolist()
    assert expected == bootstrap_interval(values, 500, seed=7).tolist()
    assert expected != bootstrap_interval(values, 500, seed=8).tolist()
    monkeypatch.setattr(bootstrap, "_CHUNK", 120)
    assert expected == bootstrap_interval(values, 500, seed=7).tolist()


# E[1 - (1 - p)^K] for p from Beta(a, b) is 1 - B(a, b + K) / B(a, b).
def true_pass_at_k(a: float, b: float, k: int) -> float:
    return 1 - exp(lgamma(b + k) + lgamma(a + b) - lgamma(b) - lgamma(a + b + k))


@pytest.mark.parametrize(("a", "b"), [(0.3, 1.5), (0.5, 0.5)], ids=["hard", "easy or hard"])
def test_intervals_of_95_percent_cover_the_truth_in_93_to_97(a: float, b: float) -> None:
    """P = 200 problems with n = 64 samples; easy problems and hopeless ones are the common ones."""
    rng = np.random.default_rng(11)
    ks = np.array([1, 8, 64])
    truth = np.array([true_pass_at_k(a, b, k) for k in ks.tolist()])
    covered, num_trials = np.zeros(3), 800
    for trial in range(num_trials):
        num_correct = rng.binomial(64, rng.beta(a, b, size=200))
        low, high = bootstrap_interval(pass_at_k(64, num_correct[:, None], ks), 600, seed=trial).T
        covered += (low <= truth) & (truth <= high)
    assert np.all((covered / num_trials >= 0.93) & (covered / num_trials <= 0.97)), covered / num_trials


def test_thirty_problems_still_have_their_coverage() -> None:
    """AIME's size, where the percentile interval covers 92 % (docs/evaluation.md)."""
    rng = np.random.default_rng(12)
    truth, covered = true_pass_at_k(0.3, 1.5, 64), 0
    for trial in range(1000):
        num_correct = rng.binomial(64, rng.beta(0.3, 1.5, size=30))
        low, high = bootstrap_interval(pass_at_k(64, num_correct, 64), 600, seed=trial)
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97, covered / 1000


@pytest.mark.parametrize(
    ("probability", "degrees", "expected", "tolerance"),
    [
        (0.975, 5, 2.5706, 4e-3),
        (0.975, 11, 2.2010, 2e-4),
        (0.975, 29, 2.0452, 1e-4),
        (0.95, 29, 1.6991, 1e-4),
        (0.025, 29, -2.0452, 1e-4),
    ],
)
def test_t_quantile_is_that_of_the_tables(
    probability: float, degrees: int, expected: float, tolerance: float
) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    ("values", "num_resamples", "level", "message"),
    [
        ([], 10, 0.95, "P >= 1"),
        (np.ones((2, 2, 2)), 10, 0.95, "P >= 1"),
        ([1.0, float("nan")], 10, 0.95, "finite"),
        ([1.0], 0, 0.95, "num_resamples"),
        ([1.0], 10, 95, "level"),
    ],
)
def test_bad_input_is_refused(values: Any, num_resamples: int, level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, num_resamples, seed=0, level=level)


# --- over problems and seeds ------------------------------------------------------------------------


def test_one_seed_leaves_the_problems() -> None:
    values = np.random.default_rng(1).random(300)
    low, high = two_way_interval(values[:, None], 20_000, seed=0)
    half_width = 1.96 * values.std() / np.sqrt(300)
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.002)


def test_seeds_that_differ_widen_the_interval() -> None:
    """Variance of the mean over the grid: of rows / P + of columns / S (+ of the rest / (P S))."""
    rng = np.random.default_rng(2)
    rows, columns = rng.normal(0, 1.0, 200), rng.normal(0, 0.2, 40)
    grid = rows[:, None] + columns
    expected = 1.96 * np.sqrt(rows.var() / 200 + columns.var() / 40)
    low, high = two_way_interval(grid, 20_000, seed=0)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.03)
    narrow_low, narrow_high = two_way_interval(grid, 20_000, seed=0, level=0.5)
    assert low < narrow_low < grid.mean() < narrow_high < high
    assert two_way_interval(np.broadcast_to(columns, (200, 40)), 20_000, seed=0)[1] == pytest.approx(
        columns.mean() + 1.96 * columns.std() / np.sqrt(40), abs=0.004
    )


def test_rounds_of_two_way_draws_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.random.default_rng(3).random((50, 3))
    whole = two_way_interval(grid, 4000, seed=0)
    monkeypatch.setattr(bootstrap, "_CHUNK", 50 * 300)
    assert two_way_interval(grid, 4000, seed=0) == pytest.approx(whole, abs=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, 2.0], "must be .P, S."), (np.ones((0, 3)), "must be .P, S."), ([[1.0], [np.nan]], "finite")],
)
def test_bad_grids_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_way_interval(values, 10, seed=0)
