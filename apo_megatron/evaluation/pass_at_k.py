"""Pass@K from counts of right samples. Pure NumPy."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CHUNK = 1 << 20  # factors held in memory at a time


@overload
def pass_at_k(num_samples: int, num_correct: int, k: int) -> float: ...
@overload
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> float | Floats: ...
def pass_at_k(num_samples: ArrayLike, num_correct: ArrayLike, k: ArrayLike) -> float | Floats:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples with c right.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374, equation 1), as a product of min(c, k)
    factors: exact 0 and 1 at the ends, no overflow, rounding below 1e-12 up to n = 10,000.

    n, c and k are integers or integer arrays that broadcast against each other: of counts c [P],
    ``pass_at_k(n, c[:, None], ks)`` is [P, K]. Returns a float for integers, else an array of float64. Memory
    beyond the result does not grow with n. Raises ValueError unless 1 <= k <= n and 0 <= c <= n: no estimate
    is unbiased for more samples than were drawn.
    """
    n, c, count = np.broadcast_arrays(
        _integers("num_samples", num_samples), _integers("num_correct", num_correct), _integers("k", k)
    )
    _refuse((c < 0) | (c > n), "num_correct must be between 0 and num_samples", num_correct=c, num_samples=n)
    _refuse((count < 1) | (count > n), "k must be between 1 and num_samples", k=count, num_samples=n)
    result = 1.0 - _all_wrong(n.ravel(), c.ravel(), count.ravel()).reshape(n.shape)
    return float(result) if result.ndim == 0 else result


def _all_wrong(n: NDArray[np.int64], c: NDArray[np.int64], k: NDArray[np.int64]) -> Floats:
    """[N]: C(n - c, k) / C(n, k) = C(n - k, c) / C(n, c), so the shorter of two products will do."""
    small, large = np.minimum(c, k), np.maximum(c, k)
    possible = small + large <= n
    result = possible.astype(np.float64)
    num_factors = int(small.max(where=possible, initial=0))
    width = max(1, _CHUNK // max(1, len(n)))
    n, small, large = n[:, None], small[:, None], large[:, None]
    for start in range(0, num_factors, width):
        j = np.arange(start, min(start + width, num_factors))
        used = (j < small) & possible[:, None]
        result *= np.where(used, (n - large - j) / np.where(used, n - j, 1), 1.0).prod(axis=1)
    return result


def _integers(name: str, values: ArrayLike) -> NDArray[Any]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be an integer or an array of integers, found {array.dtype}")
    return array.astype(np.int64)


def _refuse(broken: NDArray[np.bool_], expected: str, **values: NDArray[np.int64]) -> None:
    """Raise ValueError with the first values for which ``broken`` holds."""
    if broken.any():
        first = np.unravel_index(int(broken.argmax()), broken.shape)
        found = ", ".join(f"{name}={int(array[first])}" for name, array in values.items())
        where = f" at index {tuple(map(int, first))}" if first else ""
        raise ValueError(f"{expected}, found {found}{where}")
