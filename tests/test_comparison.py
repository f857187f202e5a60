"""Two checkpoints on the same problems: the tests against enumeration and simulation, flips, and errors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
import pytest

from apo_megatron.errors import DataError
from apo_megatron.evaluation import comparison, pass_at_k
from apo_megatron.evaluation.comparison import compare, holm, mcnemar_p_value, sign_flip_p_value


@dataclass(frozen=True)
class Evaluation:
    prompt_ids: tuple[str, ...]
    num_samples: int
    num_correct: tuple[int, ...]


def evaluation(num_correct: dict[str, int], num_samples: int = 8) -> Evaluation:
    return Evaluation(tuple(num_correct), num_samples, tuple(num_correct.values()))


def draw(rng: np.random.Generator, chances: np.ndarray, num_samples: int) -> Evaluation:
    ids = tuple(f"p{i}" for i in range(len(chances)))
    return Evaluation(ids, num_samples, tuple(rng.binomial(num_samples, chances).tolist()))


A = evaluation({"x": 4, "y": 0, "z": 8, "u": 0, "v": 1})
B = evaluation({"v": 0, "u": 0, "z": 8, "y": 2, "x": 1})  # another order


def test_problems_are_matched_by_id() -> None:
    result = compare(A, B, (1, 4), num_resamples=500)
    assert (result.num_problems, result.num_samples) == (5, 8)
    for k in (1, 4):
        a = np.asarray(pass_at_k(8, [4, 0, 8, 0, 1], k))
        b = np.asarray(pass_at_k(8, [1, 2, 8, 0, 0], k))
        found = result.differences[k]
        assert (found.a, found.b) == pytest.approx((a.mean(), b.mean()))
        assert found.difference == pytest.approx((a - b).mean())
        assert found.ci95[0] < found.difference < found.ci95[1]
        assert found.p_value == sign_flip_p_value(a - b, 500, seed=0)
    pair = [result.differences[k] for k in (1, 4)]
    assert [d.p_holm for d in pair] == holm([d.p_value for d in pair]).tolist()


def test_flips_name_the_problems() -> None:
    flips = compare(A, B, (1,)).flips
    assert (flips.only_a, flips.only_b) == (("v",), ("y",))
    assert (flips.both, flips.neither) == (("x", "z"), ("u",))
    assert flips.p_value == 1.0


def test_exchanging_the_two_exchanges_the_signs() -> None:
    there, back = compare(A, B, (1, 8)), compare(B, A, (1, 8))
    for k in (1, 8):
        assert back.differences[k].difference == pytest.approx(-there.differences[k].difference, abs=1e-15)
        assert back.differences[k].p_value == there.differences[k].p_value
    assert set(back.flips.only_a) == set(there.flips.only_b)


def test_a_comparison_is_plain_json() -> None:
    values = json.loads(json.dumps(asdict(compare(A, B, (1, 4)))))
    assert list(values["differences"]) == ["1", "4"] and values["flips"]["neither"] == ["u"]


def test_a_checkpoint_does_not_differ_from_itself() -> None:
    result = compare(A, A, (1, 8))
    for k in (1, 8):
        found = result.differences[k]
        assert (found.difference, found.ci95, found.p_value, found.p_holm) == (0.0, (0.0, 0.0), 1.0, 1.0)
    assert result.flips.only_a == result.flips.only_b == ()


def test_the_interval_ignores_the_spread_between_problems() -> None:
    rng = np.random.default_rng(5)
    chances = rng.beta(0.4, 0.4, size=200)
    a, b = draw(rng, chances, 256), draw(rng, chances * 0.9, 256)
    found = compare(a, b, (1,), num_resamples=1000).differences[1]
    alone = 1.96 * np.std(np.array(a.num_correct) / 256) / np.sqrt(200)
    assert found.ci95[1] - found.ci95[0] < alone / 2
    assert found.ci95[0] <= 0.1 * chances.mean() <= found.ci95[1]


def test_few_problems_are_tested_exactly() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        values = rng.integers(-3, 4, size=7) / 10  # sums that are equal but for rounding
        patterns = np.array(list(product((1, -1), repeat=7))) * values
        expected = np.mean(np.abs(patterns.sum(axis=1)) >= abs(values.sum()) - 1e-12)
        assert sign_flip_p_value(values, num_permutations=1, seed=0) == pytest.approx(expected, abs=1e-15)
    assert sign_flip_p_value([0.1] * 3 + [0.0] * 500, 1, seed=0) == pytest.approx(2 / 2**3)
    assert sign_flip_p_value([], 1, seed=0) == sign_flip_p_value([0.0, 0.0], 1, seed=0) == 1.0


def test_many_problems_agree_with_the_exact_test(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(0.3, 1, size=18)
    exact = sign_flip_p_value(values, 1, seed=0)
    monkeypatch.setattr(comparison, "_MAX_EXACT", 0)
    drawn = sign_flip_p_value(values, 20_000, seed=0)
    assert 0.05 < exact < 0.8 and drawn == pytest.approx(exact, abs=4 * np.sqrt(0.25 / 20_000))
    monkeypatch.setattr(comparison, "_CHUNK", 100)
    assert sign_flip_p_value(values, 20_000, seed=0) == pytest.approx(exact, abs=4 * np.sqrt(0.25 / 20_000))
    assert sign_flip_p_value(np.ones(60), 999, seed=0) == 1 / 1000  # never 0


def p_values(chances_a: np.ndarray, chances_b: np.ndarray, k: int, num_trials: int) -> np.ndarray:
    """Of pairs of evaluations of the same problems (64 samples each)."""
    rng = np.random.default_rng(3)
    found = []
    for trial in range(num_trials):
        a, b = (np.asarray(pass_at_k(64, rng.binomial(64, p), k)) for p in (chances_a, chances_b))
        found.append(sign_flip_p_value(a - b, 400, seed=trial))
    return np.array(found)


@pytest.mark.parametrize("k", [1, 8])
def test_p_values_are_uniform_where_there_is_no_difference(k: int) -> None:
    chances = np.random.default_rng(4).beta(0.8, 1.5, size=100)
    found = np.sort(p_values(chances, chances, k, num_trials=1000))
    assert np.abs(found - np.arange(1, 1001) / 1000).max() < 0.05  # Kolmogorov-Smirnov: 0.043 at 5 %
    assert 0.035 <= np.mean(found <= 0.05) <= 0.065


def test_a_difference_is_found() -> None:
    chances = np.random.default_rng(4).beta(0.8, 1.5, size=100)
    better = chances + 0.2 * chances * (1 - chances)
    assert np.mean(p_values(better, chances, 1, num_trials=100) <= 0.05) > 0.9
    assert np.mean(p_values(better[:20], chances[:20], 1, num_trials=100) <= 0.05) < 0.6  # too few problems


def test_holm_is_that_of_the_definition() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.5]), [1.0, 1.0])
    assert holm([0.2]).tolist() == [0.2] and holm([]).tolist() == []


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (0, 6, 2 / 2**6), (8, 1, 2 * 10 / 2**9), (3, 2, 1.0)],
)
def test_mcnemar_is_the_sign_test_of_the_flips(only_a: int, only_b: int, expected: float) -> None:
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(expected)
    assert mcnemar_p_value(only_b, only_a) == mcnemar_p_value(only_a, only_b)


def test_mcnemar_takes_thousands_of_flips() -> None:
    assert 0 < mcnemar_p_value(2_000, 1_500) < 1e-15


def test_other_problems_are_named() -> None:
    other = evaluation({"x": 1, "y": 2, "w": 3})
    with pytest.raises(DataError, match="only A has 'z', 'u', 'v'; only B has 'w'"):
        compare(A, other, (1,))
    many = evaluation({f"p{i}": 0 for i in range(9)})
    with pytest.raises(DataError, match="only B has 'p0', 'p1', 'p2', 'p3', 'p4' and 4 more"):
        compare(A, many, (1,))


def test_evaluations_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="B has problems twice: 'x'"):
        compare(A, Evaluation(("x", "x"), 8, (1, 2)), (1,))
    with pytest.raises(DataError, match="A has 8 samples per problem and B 16"):
        compare(A, evaluation(dict(zip(A.prompt_ids, A.num_correct, strict=True)), num_samples=16), (1,))
    with pytest.raises(ValueError, match="k must be between 1 and num_samples, found k=9"):
        compare(A, B, (1, 9))
    with pytest.raises(ValueError, match="num_permutations"):
        sign_flip_p_value([1.0], 0, seed=0)
    with pytest.raises(ValueError, match="shape"):
        sign_flip_p_value([[1.0]], 10, seed=0)
