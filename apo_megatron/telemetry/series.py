"""Metrics over steps as arrays: what pictures and reports draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
History = Sequence[Mapping[str, float]]  # the lines of one metrics.jsonl


def series(history: History, key: str) -> tuple[Floats, Floats]:
    """Steps [n] and values [n] that are finite; of several lines for one step (a resumed run) the last."""
    found = {line["step"]: line[key] for line in history if math.isfinite(line.get(key, math.nan))}
    steps = sorted(found)
    return np.array(steps, dtype=float), np.array([found[step] for step in steps], dtype=float)


def smooth(values: Floats) -> Floats:
    """Centred running mean over a twentieth of the points (an odd number), narrower at the ends."""
    half = len(values) // 40
    sums = np.cumsum(np.append(0.0, values))
    centers = np.arange(len(values))
    low, high = np.maximum(centers - half, 0), np.minimum(centers + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def thinned(steps: Floats, values: Floats, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` points: the lowest and highest of limit / 2 stretches, so that spikes stay."""
    if len(steps) <= limit:
        return steps, values
    edges = np.linspace(0, len(steps), limit // 2 + 1).astype(int)
    chosen: set[int] = set()
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        chosen |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
    kept = sorted(chosen)
    return steps[kept], values[kept]


def rounded(values: Floats) -> list[float]:
    """To five digits: more nobody sees, and a page has to carry them."""
    return [float(f"{value:.5g}") for value in values]
