"""Metric sums: splits change nothing, quantiles are right to their resolution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apo_megatron.objectives import MetricSums, TokenMetric


def gathered(*parts: dict[str, TokenMetric]) -> MetricSums:
    sums = MetricSums()
    for part in parts:
        sums.add(part)
    return sums


def metrics_of(values: Tensor, mask: Tensor) -> dict[str, TokenMetric]:
    return {
        "ratio": TokenMetric(values, mask, quantiles=True),
        "mean": TokenMetric(values),
        "share": TokenMetric(values > 1),
        "loss": TokenMetric(values / 100, reduction="sum"),
        "largest": TokenMetric(values, mask, reduction="max"),
    }


def random_tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator, dtype=torch.float64).mul(4).exp()
    return values, torch.rand(500, generator=generator) < 0.7


def test_means_sums_and_quantiles() -> None:
    values, mask = random_tokens()
    result = gathered(metrics_of(values, mask)).finalize()
    assert result["mean"] == pytest.approx(values.mean().item(), rel=1e-12)
    assert result["share"] == pytest.approx((values > 1).double().mean().item())
    assert result["loss"] == pytest.approx(values.sum().item() / 100, rel=1e-12)
    chosen = values[mask].numpy()
    assert result["ratio"] == pytest.approx(chosen.mean(), rel=1e-12)
    for key, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
        exact = np.quantile(chosen, q, method="inverted_cdf")
        assert result[f"ratio_{key}"] == pytest.approx(exact, rel=0.0236), key
    assert result["largest"] == pytest.approx(chosen.max(), rel=0.0236)
    assert not [name for name in result if name.startswith(("mean_", "loss_", "share_", "largest_"))]


def test_any_split_gives_the_same_result_also_with_empty_parts() -> None:
    values, mask = random_tokens()
    whole = gathered(metrics_of(values, mask)).finalize()
    cuts = [0, 0, 3, 200, 200, 471, 500]
    parts = [metrics_of(values[a:b], mask[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    ranks = [gathered(*parts[:1]), gathered(*parts[1:4]), gathered(*parts[4:])]  # the first has no token
    total = torch.stack([rank.flat() for rank in ranks]).sum(dim=0)
    assert total.dtype == torch.float64
    ranks[0].load_flat(total)
    assert ranks[0].finalize() == pytest.approx(whole, rel=1e-12)


def test_values_outside_the_mask_may_be_anything() -> None:
    values = torch.tensor([0.5, math.nan, math.inf, -math.inf])
    metric = TokenMetric(values, torch.tensor([True, False, False, False]), quantiles=True)
    result = gathered({"x": metric}).finalize()
    assert result == pytest.approx(
        {"x": 0.5, **{f"x_{k}": 0.5 for k in ("p05", "p50", "p95", "max")}}, rel=0.024
    )


def test_a_nan_that_counts_is_seen() -> None:
    assert math.isnan(gathered({"x": TokenMetric(torch.tensor([1.0, math.nan]))}).finalize()["x"])


def test_ends_of_the_histogram() -> None:
    values = torch.tensor([0.0, 1e-300, 1e-40, 1.0, 1e20, math.inf], dtype=torch.float64)
    for i, expected in enumerate([0.0, 0.0, 1e-40, 1.0, 1e20, 1e20]):
        result = gathered({"x": TokenMetric(values[i : i + 1], quantiles=True)}).finalize()
        assert result["x_p50"] == pytest.approx(expected, rel=1e-12)
        assert math.isfinite(result["x"])


def test_no_token_no_mean_but_the_layout_stays() -> None:
    empty = gathered(metrics_of(torch.zeros(0), torch.zeros(0, dtype=torch.bool)))
    full = gathered(metrics_of(torch.ones(2), torch.ones(2, dtype=torch.bool)))
    assert empty.flat().shape == full.flat().shape
    assert empty.finalize() == {"loss": 0.0}
    assert MetricSums().flat().shape == (0,) and MetricSums().finalize() == {}


def test_a_tensor_of_other_metrics_is_refused() -> None:
    with pytest.raises(AssertionError, match="other ranks differ"):
        gathered({"x": TokenMetric(torch.ones(1))}).load_flat(torch.zeros(4, dtype=torch.float64))
