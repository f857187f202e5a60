"""Majority@K against enumeration of all draws, and against drawing at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from apo_megatron.evaluation import pass_at_k
from apo_megatron.evaluation.answers import _gauss_rule, majority_at_k, num_distinct_correct

Answers = Sequence[str | None]


def share_right(draw: Answers, right: set[str]) -> Fraction:
    """The chance that a right answer wins this vote."""
    votes = Counter(answer for answer in draw if answer is not None)
    winners = [answer for answer in votes if votes[answer] == max(votes.values())]
    return Fraction(sum(answer in right for answer in winners), len(winners)) if winners else Fraction(0)


def enumerated(answers: Answers, right: set[str], k: int) -> float:
    draws = [share_right(draw, right) for draw in combinations(answers, k)]
    return float(sum(draws) / len(draws))


def verdicts(answers: Answers, right: set[str]) -> list[bool]:
    return [answer in right for answer in answers]


def test_equals_the_mean_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(150):
        n, num_answers = int(rng.integers(1, 10)), int(rng.integers(1, 8))
        answers = [[None, *"abcdefg"][i] for i in rng.integers(0, num_answers + 1, n)]
        right = {answer for answer in "abcdefg" if rng.random() < 0.4}
        ks = range(1, n + 1)
        found = majority_at_k(answers, verdicts(answers, right), ks)
        expected = [enumerated(answers, right, k) for k in ks]
        np.testing.assert_allclose(found, expected, atol=1e-13, rtol=0)
        seen.update(expected)
    assert len(seen) > 100


def test_ties_are_broken_evenly() -> None:
    assert majority_at_k(["a", "b"], [True, False], [2]) == pytest.approx([1 / 2], abs=1e-14)
    assert majority_at_k(["a", "b", "c"], [True, False, True], [3]) == pytest.approx([2 / 3], abs=1e-14)
    assert majority_at_k(["a", "b", "c", "a"], [True, False, False, True], [4]) == pytest.approx([1.0])


def test_samples_without_an_answer_do_not_vote() -> None:
    answers = [None, None, None, "a"]
    assert majority_at_k(answers, verdicts(answers, {"a"}), [1, 2, 4]) == pytest.approx([1 / 4, 1 / 2, 1.0])
    assert majority_at_k([None, None], [False, False], [1, 2]).tolist() == [0.0, 0.0]


def test_one_vote_is_pass_at_1_and_a_large_majority_wins() -> None:
    answers = ["right"] * 300 + ["wrong"] * 400 + [f"other {i}" for i in range(324)]
    one, all_of_them = majority_at_k(answers, verdicts(answers, {"right"}), [1, 1024])
    assert one == pytest.approx(pass_at_k(1024, 300, 1), abs=1e-12)
    assert all_of_them == pytest.approx(0.0, abs=1e-12)
    assert majority_at_k(answers, verdicts(answers, {"wrong"}), [1024])[0] == pytest.approx(1.0, abs=1e-12)
    # Right in all its forms: no vote can go wrong.
    np.testing.assert_allclose(majority_at_k(answers, [True] * 1024, [1, 7, 256, 1024]), 1.0, atol=1e-12)


@pytest.mark.parametrize(("n", "m", "k"), [(1024, 500, 511), (1024, 500, 512), (10_000, 4_995, 1_001)])
def test_two_answers_agree_with_rational_arithmetic(n: int, m: int, k: int) -> None:
    """Of k samples u are right, hypergeometric: right wins above k / 2, and half of the ties."""
    answers = ["right"] * m + ["wrong"] * (n - m)
    ways = [comb(m, u) * comb(n - m, k - u) for u in range(k // 2, k + 1)]
    won = sum(ways[1:]) + (Fraction(ways[0], 2) if k % 2 == 0 else 0)
    found = majority_at_k(answers, verdicts(answers, {"right"}), [k])[0]
    assert found == pytest.approx(float(won / Fraction(comb(n, k))), abs=1e-13)


@pytest.mark.parametrize("k", [5, 64, 200])
def test_many_samples_agree_with_drawing_at_random(k: int) -> None:
    rng = np.random.default_rng(k)
    answers: Answers = ["r"] * 40 + ["w"] * 42 + ["s"] * 38 + ["x"] * 30 + [None] * 26
    answers = [*answers, *map(str, range(80))]
    right = {"r", "s", "7", "8"}
    draws = [share_right([answers[i] for i in rng.permutation(256)[:k]], right) for _ in range(2000)]
    values = np.array(draws, dtype=np.float64)
    standard_error = values.std() / np.sqrt(len(values))
    assert standard_error > 0.005  # the case says something
    found = majority_at_k(answers, verdicts(answers, right), [k])[0]
    assert abs(found - values.mean()) < 4 * standard_error


def test_the_gauss_rule_integrates_powers() -> None:
    for num_points in (1, 3, 60):
        for power in range(2 * num_points):
            found = sum(weight * x**power for x, weight in _gauss_rule(num_points))
            assert found == pytest.approx(1 / (power + 1), rel=1e-12)


def test_distinct_right_answers_are_counted_once() -> None:
    answers = ["1", "2", "1", None, "3", "3"]
    assert num_distinct_correct(answers, [True, True, True, False, False, False]) == 2
    assert num_distinct_correct([None], [False]) == 0


@pytest.mark.parametrize(
    ("answers", "is_right", "k", "message"),
    [
        (["a"], [True], 2, "between 1 and the number of samples 1, found 2"),
        (["a"], [True], 0, "found 0"),
        (["a"], [True, False], 1, "1 answers, 2 verdicts"),
        (["b", "a", "b"], [True, False, False], 1, "right and wrong: 'b'"),
        ([None, "a"], [True, True], 1, "None"),
    ],
)
def test_bad_input_is_refused(answers: Answers, is_right: list[bool], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        majority_at_k(answers, is_right, [k])
