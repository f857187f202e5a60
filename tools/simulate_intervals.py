"""How often 95 % intervals over problems cover the truth: ours beside the plain percentile bootstrap.

    python tools/simulate_intervals.py        # a minute

Draws benchmarks of P problems whose chances of a right sample follow Beta(a, b), n samples each, and counts
in how many the interval of mean Pass@K holds the mean over all problems there could be. Prints the table of
docs/evaluation.md.
"""

from __future__ import annotations

import argparse
from math import exp, lgamma

import numpy as np

from apo_megatron.evaluation import pass_at_k
from apo_megatron.evaluation.bootstrap import bootstrap_interval

DIFFICULTIES = ((0.3, 1.5), (0.5, 0.5))  # mostly hard problems; mostly hopeless or trivial ones
PROBLEMS = (10, 30, 100, 200)
SAMPLES = 64
KS = (1, 8, 64)


def true_pass_at_k(a: float, b: float, k: int) -> float:
    """E[1 - (1 - p)^k] for p from Beta(a, b): 1 - B(a, b + k) / B(a, b)."""
    return 1 - exp(lgamma(b + k) + lgamma(a + b) - lgamma(b) - lgamma(a + b + k))


def percentile_interval(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """[M, 2] of ``values`` [P, M], for comparison."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    return np.quantile(values[drawn].mean(axis=1), [0.025, 0.975], axis=0).T


def coverage(a: float, b: float, num_problems: int, num_trials: int, num_resamples: int) -> np.ndarray:
    """[2, K]: share of trials in which the truth lies inside, of the percentile interval and of ours."""
    rng = np.random.default_rng(num_problems)
    truth = np.array([true_pass_at_k(a, b, k) for k in KS])
    covered = np.zeros((2, len(KS)))
    for trial in range(num_trials):
        num_correct = rng.binomial(SAMPLES, rng.beta(a, b, size=num_problems))
        values = np.asarray(pass_at_k(SAMPLES, num_correct[:, None], np.array(KS)))
        intervals = (
            percentile_interval(values, num_resamples, trial),
            bootstrap_interval(values, num_resamples, trial),
        )
        for row, (low, high) in enumerate(interval.T for interval in intervals):
            covered[row] += (low <= truth) & (truth <= high)
    return covered / num_trials


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of 95 % intervals over problems.")
    parser.add_argument("--trials", type=int, default=1000, help="benchmarks drawn per line")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws per interval")
    args = parser.parse_args()
    print(f"{args.trials} benchmarks a line, n = {SAMPLES}, {args.resamples} resamples\n")
    columns = [f"{name} @{k}" for k in KS for name in ("percentile", "ours")]
    print(f"| difficulty | P | {' | '.join(columns)} |")
    print("|---|---:|" + "---:|" * len(columns))
    for a, b in DIFFICULTIES:
        for num_problems in PROBLEMS:
            shares = 100 * coverage(a, b, num_problems, args.trials, args.resamples)
            cells = " | ".join(f"{share:.1f}" for share in shares.T.ravel())
            print(f"| Beta({a}, {b}) | {num_problems} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
