"""Pass@K and its uncertainty. Pure NumPy."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK = 1 << 22  # bootstrap draws held in memory at a time


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> float | Floats: ...
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> float | Floats:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples with c right.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374, equation 1), as the product of k factors
    (n - c - j) / (n - j): exact 0 and 1 at the ends, no overflow, rounding below 1e-13.

    n, c and k are integers or integer arrays that broadcast against each other. Returns a float for
    integers, else an array of float64. Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    n, c, count = np.broadcast_arrays(
        _integers("num_samples", num_samples), _integers("num_correct", num_correct), _integers("k", k)
    )
    _require((c >= 0) & (c <= n), f"num_correct must be between 0 and num_samples, found {c} of {n}")
    _require((count >= 1) & (count <= n), f"k must be between 1 and num_samples, found k={count}, n={n}")
    j = np.arange(count.max(initial=0))
    n, c, count = n[..., None], c[..., None], count[..., None]
    all_wrong = np.where(j < count, np.maximum(n - c - j, 0) / np.maximum(n - j, 1), 1.0).prod(axis=-1)
    result = 1.0 - all_wrong
    return float(result) if result.ndim == 0 else result


def bootstrap_interval(
    per_problem: ArrayLike, num_resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean over problems.

    ``per_problem`` [P] holds one value a problem; problems are drawn with replacement, so the interval says
    how far another set of problems could move the mean. Raises ValueError for an empty or non-1-d array.
    """
    values = np.asarray(per_problem, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"per_problem must be a non-empty 1-d array, found shape {values.shape}")
    _require(np.asarray(num_resamples >= 1), f"num_resamples must be at least 1, found {num_resamples}")
    _require(np.asarray(0 < level < 1), f"level must be between 0 and 1, found {level}")
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, _CHUNK // len(values))
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        means[start:stop] = values[rng.integers(0, len(values), (stop - start, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap_difference(
    per_problem_a: ArrayLike, per_problem_b: ArrayLike, num_resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean of a - b, low, high) for two methods on the same problems, in the same order.

    Both are resampled with the same problems, which takes the spread between problems out of the interval.
    """
    a, b = np.asarray(per_problem_a, dtype=np.float64), np.asarray(per_problem_b, dtype=np.float64)
    _require(np.asarray(a.shape == b.shape), f"both methods need the same problems: {a.shape}, {b.shape}")
    low, high = bootstrap_interval(a - b, num_resamples, seed, level)
    return float((a - b).mean()), low, high


def _integers(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be an integer or an array of integers, found {array.dtype}")
    return array.astype(np.int64)


def _require(condition: NDArray[Any], message: str) -> None:
    if not condition.all():
        raise ValueError(message)
