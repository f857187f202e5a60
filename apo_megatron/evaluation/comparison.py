"""Two checkpoints on the same problems: differences, significance and flips. Pure NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apo_megatron.errors import DataError
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import Floats, pass_at_k

_MAX_EXACT = 20  # differing problems whose 2^20 sign patterns are all tried
_CHUNK = 1 << 22  # signs held in memory at a time
_NUM_NAMED = 5  # problems that a message names


class Counts(Protocol):
    """What of an evaluation is compared; harness.PassAtKResult has it."""

    @property
    def prompt_ids(self) -> Sequence[str]: ...  # [P]
    @property
    def num_samples(self) -> int: ...  # n, per problem
    @property
    def num_correct(self) -> Sequence[int]: ...  # [P]


@dataclass(frozen=True)
class Difference:
    """Pass@K of A minus that of B, means over problems, in [-1, 1]."""

    a: float
    b: float
    difference: float
    ci95: tuple[float, float]  # paired bootstrap over problems
    p_value: float  # two-sided sign-flip test
    p_holm: float  # the same, corrected for the number of K


@dataclass(frozen=True)
class Flips:
    """Which problems have at least one right sample; prompt_ids in the order of A."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    both: tuple[str, ...]
    neither: tuple[str, ...]
    p_value: float  # McNemar's test, exact


@dataclass(frozen=True)
class Comparison:
    """``compare``'s answer. ``json.dumps(dataclasses.asdict(...))`` writes it, K as text."""

    num_problems: int
    num_samples: int
    differences: dict[int, Difference]  # by K
    flips: Flips


def compare(
    a: Counts, b: Counts, ks: Sequence[int], *, num_resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Checkpoint A against checkpoint B, problem by problem (matched by id, in any order).

    ``num_resamples`` is the number of bootstrap draws and of sign patterns. Raises DataError where the
    problems or the samples per problem are not the same, naming the problems; ValueError unless 1 <= K <= n.
    """
    correct_a, correct_b = _matched(a, b)
    columns = np.array(ks, dtype=np.int64)
    curves_a = np.asarray(pass_at_k(a.num_samples, correct_a[:, None], columns))  # [P, K]
    curves_b = np.asarray(pass_at_k(b.num_samples, correct_b[:, None], columns))
    differences = curves_a - curves_b
    intervals = bootstrap_interval(differences, num_resamples, seed).tolist()
    p_values = [sign_flip_p_value(column, num_resamples, seed) for column in differences.T]
    corrected = holm(p_values).tolist()
    return Comparison(
        num_problems=len(correct_a),
        num_samples=a.num_samples,
        differences={
            k: Difference(
                a=float(curves_a[:, i].mean()),
                b=float(curves_b[:, i].mean()),
                difference=float(differences[:, i].mean()),
                ci95=(intervals[i][0], intervals[i][1]),
                p_value=p_values[i],
                p_holm=corrected[i],
            )
            for i, k in enumerate(ks)
        },
        flips=_flips(a.prompt_ids, correct_a > 0, correct_b > 0),
    )


def _matched(a: Counts, b: Counts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """num_correct [P] of both, in the order of A. Raises DataError."""
    for name, counts in (("A", a), ("B", b)):
        assert len(counts.prompt_ids) == len(counts.num_correct), "a count for each problem"
        repeated = [prompt_id for prompt_id, times in Counter(counts.prompt_ids).items() if times > 1]
        if repeated:
            raise DataError(f"{name} has problems twice: {_named(repeated)}; ids must be unique to compare")
    of_b = dict(zip(b.prompt_ids, b.num_correct, strict=True))
    only_a = [prompt_id for prompt_id in a.prompt_ids if prompt_id not in of_b]
    only_b = sorted(of_b.keys() - set(a.prompt_ids))
    if only_a or only_b:
        parts = [f"only {name} has {_named(ids)}" for name, ids in (("A", only_a), ("B", only_b)) if ids]
        raise DataError(
            f"not the same problems: {'; '.join(parts)}. Evaluate both checkpoints on the same problems"
        )
    if a.num_samples != b.num_samples:
        raise DataError(
            f"A has {a.num_samples} samples per problem and B {b.num_samples}: evaluate both with the same "
            "evaluation.num_samples, or the one with more solves more problems by that alone"
        )
    return (
        np.array(a.num_correct, dtype=np.int64),
        np.array([of_b[prompt_id] for prompt_id in a.prompt_ids], dtype=np.int64),
    )


def _named(prompt_ids: Sequence[str]) -> str:
    names = ", ".join(repr(prompt_id) for prompt_id in prompt_ids[:_NUM_NAMED])
    return names + (f" and {len(prompt_ids) - _NUM_NAMED} more" if len(prompt_ids) > _NUM_NAMED else "")


def sign_flip_p_value(differences: ArrayLike, num_permutations: int, seed: int) -> float:
    """Two-sided p-value that the mean of paired ``differences`` [P] is 0, by flipping their signs.

    If A and B are alike, exchanging them on any problem changes nothing: each sign is as likely as the other.
    The p-value is the share of sign patterns with a mean at least as far from 0 as the one found: of all
    patterns where at most 20 problems differ, else (b + 1) / (m + 1) from b of m = num_permutations random
    patterns (Phipson and Smyth 2010, arXiv 1603.05766), which is never 0. Raises ValueError for values that
    are not [P], and for num_permutations < 1.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"differences must be [P], found shape {values.shape}")
    if num_permutations < 1:
        raise ValueError(f"num_permutations must be at least 1, found {num_permutations}")
    values = values[values != 0]  # their sign changes nothing
    if len(values) == 0:
        return 1.0
    # Patterns with the same sum but for rounding count as equal.
    reached = np.abs(values.sum()) - 1e-9 * np.abs(values).sum()
    if len(values) <= _MAX_EXACT:
        sums = values[:1]  # the first sign is kept: a pattern and its mirror image are equally far from 0
        for value in values[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= reached).mean())
    rng = np.random.default_rng(seed)
    num_far = 0
    rows = max(1, _CHUNK // len(values))
    for start in range(0, num_permutations, rows):
        shape = (min(rows, num_permutations - start), len(values))
        flipped = rng.integers(0, 2, shape, dtype=np.int8)
        num_far += int((np.abs(values.sum() - 2 * (flipped @ values)) >= reached).sum())
    return (num_far + 1) / (num_permutations + 1)


def holm(p_values: ArrayLike) -> Floats:
    """[M] p-values corrected for M tests (Holm 1979): below alpha in all, by chance, with at most alpha.

    In ascending order p_i becomes max over j <= i of min(1, (M - j) p_j), j from 0.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    factors = np.arange(len(values), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return corrected


def mcnemar_p_value(num_only_a: int, num_only_b: int) -> float:
    """Exact two-sided McNemar test: a problem that only one of two solved was either's with chance 1/2."""
    num_flips = num_only_a + num_only_b
    ways = tail = 1  # C(num_flips, i), and their sum up to the smaller count
    for i in range(min(num_only_a, num_only_b)):
        ways = ways * (num_flips - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**num_flips)


def _flips(prompt_ids: Sequence[str], a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Flips:
    def chosen(mask: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(prompt_ids[i] for i in mask.nonzero()[0].tolist())

    only_a, only_b = chosen(a & ~b), chosen(~a & b)
    p_value = mcnemar_p_value(len(only_a), len(only_b))
    return Flips(only_a, only_b, chosen(a & b), chosen(~a & ~b), p_value)
