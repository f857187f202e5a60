"""Which samples of a step are trained on: every choice of a few, compared; and what becomes of the others."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
import torch

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.sampling import SampleFilterName
from apo_megatron.objectives.sample_filters import SAMPLE_FILTERS, FilterInputs, d3s, most_varied
from tests.certainty import assert_certainty_is_stated

METHODS = Path(__file__).resolve().parent.parent / "docs" / "methods.md"


def variance(values: list[int]) -> Fraction:
    mean = Fraction(sum(values), len(values))
    return sum(((value - mean) ** 2 for value in values), Fraction(0)) / len(values)


def kept_by(values: list[float], num_kept: int) -> list[int]:
    is_kept = most_varied(torch.tensor(values, dtype=torch.float64), num_kept)
    return is_kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_varies_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = 4 if seed % 2 else 1000  # with and without ties
    values = torch.randint(-spread, spread + 1, (9,), generator=generator).tolist()
    if seed % 3 == 0:  # far from even: most of them at one side
        values = [abs(value) for value in values[:-1]] + [-3 * spread]
    for num_kept in range(1, 10):
        kept = kept_by(values, num_kept)
        assert len(kept) == num_kept
        best = max(variance(list(choice)) for choice in combinations(values, num_kept))
        assert variance([values[i] for i in kept]) == best


@pytest.mark.parametrize(
    ("values", "num_kept", "expected"),
    [
        (
            [0.5, -0.5, 0.25, 0.5, -0.5, -0.5],
            4,
            [0, 1, 3, 4],
        ),  # half and half; of equals the first are smaller
        ([1.0] * 6, 4, [0, 1, 4, 5]),
        ([-3.0, 1.0, 1.0, 1.0], 3, [0, 2, 3]),
        (
            [-1.0, 1.0, -1.0, 1.0, 0.0],
            3,
            [0, 1, 3],
        ),  # the one split is as good as the other: fewer small ones
        ([2.0], 1, [0]),
        ([], 0, []),
    ],
)
def test_ties_have_an_order(values: list[float], num_kept: int, expected: list[int]) -> None:
    assert kept_by(values, num_kept) == expected


def test_where_values_lie_does_not_matter() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = most_varied(values, 12)
    assert torch.equal(most_varied(values + 1e6, 12), kept)
    assert torch.equal(most_varied(values * 1e-9, 12), kept)


@pytest.mark.parametrize(
    ("first_share", "progress", "num_samples", "expected"),
    [(0.5, 0.0, 20, 10), (0.5, 0.5, 20, 15), (0.5, 1.0, 20, 20), (0.3, 0.0, 10, 3), (0.01, 0.0, 9, 2)]
    + [(1.0, 0.0, 7, 7), (0.01, 0.0, 1, 1), (0.5, 0.0, 0, 0)],
)
def test_the_share_grows_to_1(first_share: float, progress: float, num_samples: int, expected: int) -> None:
    cfg = RolloutConfig.model_validate({"sample_filter": "d3s", "d3s": {"first_share": first_share}})
    advantages = torch.arange(num_samples, dtype=torch.float64)
    assert int(d3s(FilterInputs(advantages, progress), cfg).sum()) == expected


def test_what_a_configuration_may_name_is_what_is_registered_and_described() -> None:
    assert get_args(SampleFilterName) == tuple(SAMPLE_FILTERS)
    section = METHODS.read_text().split("\n## Samples\n")[1].split("\n## ")[0]
    rows = set(re.findall(r"^\| `sample_filter: (\w+)` \|", section, re.MULTILINE))
    assert rows == set(SAMPLE_FILTERS)
    for name in set(SAMPLE_FILTERS) - {"none"}:
        assert_certainty_is_stated(name, SAMPLE_FILTERS[name])
