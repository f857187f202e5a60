"""Majority@K and distinct right answers from the answers to one problem. Pure NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from apo_megatron.evaluation.pass_at_k import Floats

_NEGLIGIBLE = 1e-22  # a probability far below rounding


def num_distinct_correct(answers: Sequence[str | None], is_right: Sequence[bool]) -> int:
    """How many different right answers there are. Raises ValueError as ``majority_at_k`` does."""
    return len(_right_answers(answers, is_right))


def majority_at_k(answers: Sequence[str | None], is_right: Sequence[bool], ks: Sequence[int]) -> Floats:
    """[len(ks)]: the chance that the answer with most votes among K of the n samples is right.

    The mean over all C(n, K) draws without replacement (Wang et al. 2022, arXiv 2203.11171, call the vote
    self-consistency), exact but for rounding below 1e-12; nothing is simulated. ``answers`` [n] are compared
    as strings: bring equal answers to one form first. None does not vote; where nobody votes the result is
    wrong. Among the answers with most votes one is taken at random, each with the same chance.

    Raises ValueError unless 1 <= K <= n, where the lengths differ, where the same answer is right in one
    place and wrong in another, and for a right None.
    """
    right = _right_answers(answers, is_right)
    for k in ks:
        if not 1 <= k <= len(answers):
            raise ValueError(f"k must be between 1 and the number of samples {len(answers)}, found {k}")
    votes = Counter(answer for answer in answers if answer is not None)
    sizes = sorted(set(votes.values()))
    with_size = Counter(votes.values())
    right_with_size = Counter(votes[answer] for answer in right)
    groups = np.array([(m, with_size[m], right_with_size[m]) for m in sizes], dtype=np.int64).reshape(-1, 3)
    return np.array([_right_wins(groups, len(answers), k) for k in ks], dtype=np.float64)


def _right_answers(answers: Sequence[str | None], is_right: Sequence[bool]) -> set[str]:
    if len(answers) != len(is_right):
        raise ValueError(f"every answer needs a verdict: {len(answers)} answers, {len(is_right)} verdicts")
    judged = list(zip(answers, is_right, strict=True))
    right = {answer for answer, verdict in judged if verdict}
    both = right & {answer for answer, verdict in judged if not verdict}
    if both:
        raise ValueError(f"the same answer is right and wrong: {sorted(map(str, both))[0]!r}")
    if None in right:
        raise ValueError("a sample without an answer (None) cannot be right")
    return {answer for answer in right if answer is not None}


def _right_wins(groups: np.ndarray, num_samples: int, k: int) -> float:
    """The chance that a right answer wins the vote among k samples.

    ``groups`` [U, 3]: answers with the same number of samples m have the same chance, so they are taken
    together, as (m, number of such answers, right ones among them).

    The votes of a draw without replacement are independent binomials Bin(m, p), given their sum k, for any p.
    So the chance that answer r wins with v votes is the coefficient of z^k in a product of polynomials:

        at_r(z)  times, for each other answer j,  below_j(z) + x at_j(z)

    where at(z) = P(v votes) z^v and below(z) is the sum of P(u votes) z^u over u < v. A tie with t others,
    x^t, is won with chance 1 / (t + 1), the integral of x^t from 0 to 1: a Gauss rule of t // 2 + 1 points
    gives it exactly. The coefficient is read off the values at the roots of unity (a Fourier transform).
    """
    sizes, counts, num_right = groups.T
    if not num_right.any():
        return 0.0
    p = k / (num_samples + 1)  # sums near k are likely, so nothing underflows
    total = _binomial(num_samples, p)
    # The transform adds up coefficients that lie a period apart: it must reach where sums are impossible.
    period = 1 + int(np.abs(np.flatnonzero(total > _NEGLIGIBLE) - k).max())
    phase = np.exp(-2j * np.pi * np.arange(period // 2 + 1) / period)

    max_votes = min(k, int(sizes[num_right > 0].max()))
    chance = np.zeros((len(sizes), max_votes + 1))  # [U, v]: that an answer of the group has v votes
    for of_group, m in zip(chance, sizes.tolist(), strict=True):
        of_group[: m + 1] = _binomial(m, p)[: max_votes + 1]
    below = chance[:, :1] * np.ones_like(phase)  # [U, frequencies]
    wins = np.zeros_like(phase)
    for v in range(1, max_votes + 1):
        at = chance[:, v : v + 1] * phase**v
        winners = np.flatnonzero((num_right > 0) & (chance[:, v] > _NEGLIGIBLE))
        most_tied = min(int(counts[sizes >= v].sum()) - 1, k // v - 1)
        for x, weight in _gauss_rule(most_tied // 2 + 1) if len(winners) else ():
            factors = below + x * at
            for r in winners:
                others = counts - (np.arange(len(sizes)) == r)
                wins += weight * num_right[r] * at[r] * (factors ** others[:, None]).prod(axis=0)
        below += at
    silent = _binomial(num_samples - int(sizes @ counts), p)
    wins *= np.fft.rfft(np.bincount(np.arange(len(silent)) % period, silent, period))
    joint = np.fft.irfft(wins, period)[k % period]  # wins, and the sum is k
    return float(np.clip(joint / total[k], 0.0, 1.0))


def _binomial(num: int, p: float) -> Floats:
    """[num + 1]: the distribution Bin(num, p), from its mode outwards, which keeps rounding relative."""
    u = np.arange(1, num + 1)
    ratios = (num + 1 - u) / u * (p / (1 - p))  # P(u) / P(u - 1)
    mode = int((num + 1) * p)
    below, above = np.cumprod(1 / ratios[:mode][::-1])[::-1], np.cumprod(ratios[mode:])
    chances = np.concatenate([below, [1.0], above])
    return chances / chances.sum()


@lru_cache(maxsize=256)
def _gauss_rule(num_points: int) -> tuple[tuple[float, float], ...]:
    """(point, weight) of Gauss-Legendre on [0, 1]: exact for polynomials of degree 2 * num_points - 1."""
    points, weights = np.polynomial.legendre.leggauss(num_points)
    return tuple(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
