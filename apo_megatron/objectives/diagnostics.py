"""Per-token metrics as sums that add up over micro-batches and ranks.

Quantiles and maxima come from a fixed histogram of log10(value), which adds up too: 50 bins a decade, so
they are right to 2.4 %, from 1e-40 to 1e20. All of it is one flat tensor, for one all-reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.objectives.interface import TokenMetric

BINS_PER_DECADE = 50
SMALLEST_EXPONENT, LARGEST_EXPONENT = -40, 20
# Bin 0 holds what is smaller (0 above all); bin i holds values nearest to its centre in log10.
NUM_BINS = (LARGEST_EXPONENT - SMALLEST_EXPONENT) * BINS_PER_DECADE + 2
QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


class MetricSums:
    """Sum and count of every metric, and a histogram of those with quantiles or a maximum; all float64.

    The layout of ``flat`` follows from the names in alphabetical order, so ranks that added metrics of the
    same names (with or without tokens) may add their flat tensors.
    """

    def __init__(self) -> None:
        self._states: dict[str, Tensor] = {}  # [2] or [2 + NUM_BINS]: sum, count, histogram
        self._reductions: dict[str, str] = {}

    def add(self, metrics: dict[str, TokenMetric]) -> None:
        """Add the tokens of one micro-batch; names that are new so far start at zero."""
        for name, metric in metrics.items():
            state = _state_of(metric)
            known = self._states.get(name)
            self._states[name] = state if known is None else known + state
            self._reductions[name] = metric.reduction

    def flat(self) -> Tensor:
        """Everything that adds up, [n] float64; [0] where nothing was added."""
        if not self._states:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat([self._states[name] for name in sorted(self._states)])

    def load_flat(self, flat: Tensor) -> None:
        """Replace the content by ``flat``, a sum of tensors that ``flat()`` gave for the same names."""
        names = sorted(self._states)
        sizes = [len(self._states[name]) for name in names]
        assert flat.shape == (sum(sizes),), f"{tuple(flat.shape)} values for {names}: other ranks differ"
        self._states = dict(zip(names, flat.split(sizes), strict=True))

    def finalize(self) -> dict[str, float]:
        """{name: mean, sum or maximum}, with quantiles also name_p05, name_p50, name_p95 and name_max.

        A mean or maximum over no token has no value and is left out.
        """
        results: dict[str, float] = {}
        for name in sorted(self._states):
            state = self._states[name].cpu()
            total, count = state[:2].tolist()
            if self._reductions[name] == "sum":
                results[name] = total
            elif count > 0 and self._reductions[name] == "max":
                results[name] = _quantiles(state[2:])["max"]
            elif count > 0:
                results[name] = total / count
                if len(state) > 2:
                    results |= {f"{name}_{key}": value for key, value in _quantiles(state[2:]).items()}
        return results


def _state_of(metric: TokenMetric) -> Tensor:
    values = metric.values.detach().double()
    has_histogram = metric.quantiles or metric.reduction == "max"
    if has_histogram:
        values = values.clamp(max=10.0**LARGEST_EXPONENT)  # one infinite ratio must not hide the others
    mask = torch.ones_like(values, dtype=torch.bool) if metric.mask is None else metric.mask
    selected = torch.where(mask, values, 0.0)
    counts = mask.double()
    state = torch.stack([selected.sum(), counts.sum()])
    if not has_histogram:
        return state
    # No boolean indexing here: its result has a size that a GPU would have to report first.
    histogram = state.new_zeros(NUM_BINS).scatter_add_(0, _bin_of(selected), counts)
    return torch.cat([state, histogram])


def _bin_of(values: Tensor) -> Tensor:
    position = (values.log10() - SMALLEST_EXPONENT) * BINS_PER_DECADE
    bins = position.nan_to_num(nan=NUM_BINS, neginf=-1.0).round() + 1  # NaN goes to the top
    return bins.clamp(0, NUM_BINS - 1).long()


def _quantiles(histogram: Tensor) -> dict[str, float]:
    cumulative = histogram.cumsum(0)
    # The smallest bin that has at least the share q of all values at or below it.
    wanted = torch.tensor(list(QUANTILES.values()), dtype=torch.float64) * cumulative[-1]
    bins = torch.searchsorted(cumulative, wanted).tolist()
    return {key: _centre(index) for key, index in zip(QUANTILES, bins, strict=True)}


def _centre(index: int) -> float:
    return 0.0 if index == 0 else float(10.0 ** (SMALLEST_EXPONENT + (index - 1) / BINS_PER_DECADE))
