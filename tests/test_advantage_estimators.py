"""Every advantage estimator against its definition: all subsets and plain loops, in float64.

More of those on Pass@k is in test_pass_at_k_advantages.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.config import advantages as settings
from apo_megatron.objectives import (
    ADVANTAGE_ESTIMATORS,
    AdvantageInputs,
    estimate_advantages,
    group_normalized_advantages,
    teaching_groups,
)
from apo_megatron.objectives.advantages import opo_advantages
from apo_megatron.objectives.reward_term_advantages import dvao_advantages, gdpo_advantages

NAN = math.nan
PAGE = Path(__file__).resolve().parent.parent / "docs" / "objective.md"
K = 3
WEIGHTS = (0.7, 0.5, -0.2)
# Their statistics are those of the whole batch.
WHITENED = ("reinforce_plus_plus_baseline", "gdpo", "riskpo")
# Whom a group without a difference teaches something.
TAUGHT_BY_ALL_RIGHT = {"psr", "w_reinforce", *settings.BEYOND_GROUP}
TAUGHT_BY_ALL_WRONG = {"nsr", "w_reinforce", *settings.BEYOND_GROUP}


def configured(name: str) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(
        {
            "advantage_estimator": name,
            "passk": {"k": K},
            "pkpo": {"k": K},
            "w_reinforce": {"right_weight": 0.3},
            "riskpo": {"bundle_size": 1},  # more are in test_risk_advantages.py
        }
    )


def estimate(name: str, inputs: AdvantageInputs) -> Tensor:
    return estimate_advantages(inputs, configured(name))


def random_inputs(seed: int = 0) -> AdvantageInputs:
    """Groups of 7: binary and graded rewards, ties, all right, all wrong, samples and a group not judged."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(9, 7, generator=generator, dtype=torch.float64).round()
    right[1], right[2] = 0.0, 1.0
    others = torch.rand(9, 7, 2, generator=generator, dtype=torch.float64)
    others[0] = 0.0
    others[1:3] = 0.25
    others[3] = others[3].round()
    terms = torch.cat([right.unsqueeze(-1), others], dim=-1)
    terms[4, :2, 1] = NAN
    terms[5, 1:] = NAN
    terms[6] = NAN
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    rewards = terms @ weights
    lengths = torch.randint(1, 40, (9, 7), generator=generator)
    return AdvantageInputs(rewards, lengths, (terms[..., 0] >= 1) & ~rewards.isnan(), terms, weights)


# --- definitions: of one group, its judged samples ------------------------------------------------


def subsets_of(i: int, n: int, k: int) -> list[tuple[int, ...]]:
    return [subset for subset in combinations(range(n), k) if i in subset]


def plain_passk(correct: np.ndarray) -> np.ndarray:
    n = len(correct)
    all_subsets = [float(correct[list(subset)].max()) for subset in combinations(range(n), K)]
    if not all_subsets or np.std(all_subsets) == 0:
        return np.zeros(n)
    of_sample = [[float(correct[list(subset)].max()) for subset in subsets_of(i, n, K)] for i in range(n)]
    return np.array([(np.mean(own) - np.mean(all_subsets)) / np.std(all_subsets) for own in of_sample])


def plain_pkpo(rewards: np.ndarray) -> np.ndarray:
    n, found = len(rewards), np.zeros(len(rewards))
    for i in range(n):
        for subset in subsets_of(i, n, K):
            rest = [rewards[j] for j in subset if j != i]
            found[i] += max([rewards[i], *rest]) - max(rest)
    return found / max(1, math.comb(n, K)) * n / K


def plain_dvao(terms: np.ndarray) -> np.ndarray:
    if len(terms) < 2:
        return np.zeros(len(terms))
    scale = sum(abs(w) * s for w, s in zip(WEIGHTS, terms.std(axis=0, ddof=1), strict=True))
    return (terms - terms.mean(axis=0)) @ np.array(WEIGHTS) / (scale + 1e-6)


def plain_gdpo(terms: np.ndarray) -> np.ndarray:
    if len(terms) < 2:
        return np.zeros(len(terms))
    return ((terms - terms.mean(axis=0)) / (terms.std(axis=0, ddof=1) + 1e-6)) @ np.array(WEIGHTS)


def plain_opo(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rewards - (rewards * lengths).sum() / lengths.sum()


GROUP_DEFINITIONS: dict[str, Callable[[dict[str, np.ndarray]], np.ndarray]] = {
    "psr": lambda x: np.where(x["correct"] == 1, 1.0, 0.0),
    "nsr": lambda x: np.where(x["correct"] == 1, 0.0, -1.0),
    "w_reinforce": lambda x: np.where(x["correct"] == 1, 0.3, -1.0),
    "opo": lambda x: plain_opo(x["rewards"], x["lengths"]),
    "passk": lambda x: plain_passk(x["correct"]),
    "pkpo": lambda x: plain_pkpo(x["rewards"]),
    "dvao": lambda x: plain_dvao(x["terms"]),
    "gdpo": lambda x: plain_gdpo(x["terms"]),
}


DEFINED_ELSEWHERE = {
    **dict.fromkeys(("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"), "test_advantages"),
    "riskpo": "test_risk_advantages",
    "dcpo": "test_visited_advantages",
}


def test_every_estimator_has_a_definition() -> None:
    known = GROUP_DEFINITIONS.keys() | DEFINED_ELSEWHERE.keys()
    assert known == ADVANTAGE_ESTIMATORS.keys(), "one in plain numbers belongs into GROUP_DEFINITIONS"


@pytest.mark.parametrize("name", GROUP_DEFINITIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_estimators_against_their_definitions(name: str, seed: int) -> None:
    inputs = random_inputs(seed)
    assert inputs.reward_terms is not None
    expected = np.zeros(inputs.rewards.shape)
    for row in range(len(expected)):
        judged = ~inputs.rewards[row].isnan().numpy()
        group = {
            "rewards": inputs.rewards[row].numpy()[judged],
            "correct": inputs.is_correct[row].double().numpy()[judged],
            "lengths": inputs.lengths[row].numpy()[judged],
            "terms": inputs.reward_terms[row].numpy()[judged],
        }
        if judged.any():
            expected[row, judged] = GROUP_DEFINITIONS[name](group)
    if name == "gdpo":
        trained = [row for row in range(len(expected)) if np.abs(expected[row]).max() > 1e-9]
        judged = ~inputs.rewards[trained].isnan().numpy()
        expected /= expected[trained][judged].std(ddof=1) + 1e-6
    np.testing.assert_allclose(estimate(name, inputs).numpy(), expected, rtol=1e-9, atol=1e-12)


# --- what holds for all of them -------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_results_are_finite_and_0_where_nothing_was_judged(name: str) -> None:
    for inputs in (random_inputs(), _single(random_inputs())):
        found = estimate(name, inputs)
        assert found.dtype == inputs.rewards.dtype and found.isfinite().all()
        assert (found[inputs.rewards.isnan()] == 0).all() and found.ne(0).any()


def _single(inputs: AdvantageInputs) -> AdvantageInputs:
    assert inputs.reward_terms is not None and inputs.term_weights is not None
    terms, weights = inputs.reward_terms.float(), inputs.term_weights.float()
    return AdvantageInputs(inputs.rewards.float(), inputs.lengths, inputs.is_correct, terms, weights)


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_whom_groups_that_do_not_differ_teach(name: str) -> None:
    # What lies within rounding is equal.
    noise = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = 0.1 + 1e-7 * noise
    terms[0, :, 0] += 0.9
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    rewards = terms @ weights
    uniform = AdvantageInputs(rewards, torch.full((2, 7), 5), terms[..., 0] >= 1, terms, weights)
    teaches = teaching_groups(uniform, configured(name))
    assert teaches.tolist() == [name in TAUGHT_BY_ALL_RIGHT, name in TAUGHT_BY_ALL_WRONG]


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_samples_and_prompts_have_no_order(name: str) -> None:
    inputs = random_inputs(3)
    prompts = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    samples = torch.randperm(7, generator=torch.Generator().manual_seed(2))

    def moved(values: Tensor | None) -> Tensor:
        assert values is not None
        return values[prompts][:, samples]

    shuffled = replace(
        inputs,
        rewards=moved(inputs.rewards),
        lengths=moved(inputs.lengths),
        is_correct=moved(inputs.is_correct),
        reward_terms=moved(inputs.reward_terms),
    )
    found, expected = estimate(name, shuffled), moved(estimate(name, inputs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ADVANTAGE_ESTIMATORS if name not in WHITENED])
def test_what_was_not_judged_might_as_well_not_be_there(name: str) -> None:
    inputs, row = random_inputs(), 4
    judged = ~inputs.rewards[row].isnan()
    assert 3 <= judged.sum() < 7 and inputs.reward_terms is not None

    def without(values: Tensor) -> Tensor:
        return values[row : row + 1, judged]

    alone = AdvantageInputs(
        without(inputs.rewards),
        without(inputs.lengths),
        without(inputs.is_correct),
        without(inputs.reward_terms),
        inputs.term_weights,
    )
    torch.testing.assert_close(estimate(name, alone)[0], estimate(name, inputs)[row, judged])


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "passk", "gdpo", "dvao"])
def test_groups_sum_to_0(name: str) -> None:
    assert estimate(name, random_inputs()).sum(dim=1).abs().max().item() < 1e-12


def test_opo_sums_to_0_by_length_and_masked_samples_have_no_weight() -> None:
    inputs = random_inputs()
    assert (estimate("opo", inputs) * inputs.lengths).sum(dim=1).abs().max().item() < 1e-12
    masked = opo_advantages(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[4, 4, 0]]))
    assert masked.tolist() == [[0.5, -0.5, -0.5]]
    alone = opo_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[4, 0]]))
    assert alone[0, 0] == 0.0  # its baseline is itself
    assert opo_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 0]])).isfinite().all()


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_nothing_but_the_declared_needs_is_looked_at(name: str) -> None:
    inputs, needs = random_inputs(), ADVANTAGE_ESTIMATORS[name].needs
    noise = torch.randn(9, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    others: dict[str, Any] = {
        "rewards": inputs.rewards + noise,  # NaN stays: every estimator must know what was judged
        "lengths": inputs.lengths + 3 * (noise > 0),
        "is_correct": ~inputs.is_correct & ~inputs.rewards.isnan(),
        "reward_terms": None
        if inputs.reward_terms is None
        else inputs.reward_terms + noise.unsqueeze(-1) ** 2,
    }
    for field, other in others.items():
        same = torch.equal(estimate(name, replace(inputs, **{field: other})), estimate(name, inputs))
        assert same == (field not in needs), field


# --- several rewards ------------------------------------------------------------------------------


def test_dvao_of_equal_spreads_is_the_mean_of_advantages_and_of_one_term_is_grpo() -> None:
    terms = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([0.6, 0.2], dtype=torch.float64)
    by_term = [group_normalized_advantages(terms[..., i], eps=0.0) for i in range(2)]
    expected = (0.6 * by_term[0] + 0.2 * by_term[1]) / 0.8
    torch.testing.assert_close(dvao_advantages(terms, weights, eps=0.0), expected)
    terms[..., 1] = 0.5  # differs nowhere: no weight at all
    torch.testing.assert_close(dvao_advantages(terms, weights, eps=0.0), by_term[0])


def test_gdpo_has_unit_std_over_what_is_trained() -> None:
    inputs = random_inputs()
    found = estimate("gdpo", inputs)
    trained = found.ne(0).any(dim=1, keepdim=True) & ~inputs.rewards.isnan()
    assert found[trained].std().item() == pytest.approx(1.0, rel=1e-5)
    assert inputs.reward_terms is not None and inputs.term_weights is not None
    twice = gdpo_advantages(torch.cat([inputs.reward_terms] * 2), inputs.term_weights)
    torch.testing.assert_close(twice[:9], found, rtol=0.05, atol=0)  # another divisor only


def test_groups_of_equal_sums_teach_where_their_terms_differ() -> None:
    terms = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    inputs = AdvantageInputs(
        torch.full((1, 2), 0.5),
        torch.ones(1, 2, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.bool),
        terms,
        torch.tensor([0.5, 0.4]),
    )
    assert [teaching_groups(inputs, configured(name)).item() for name in ("grpo", "gdpo", "dvao")] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group_size", [5, 6, 7])
def test_rounding_of_terms_that_cancel_is_no_advantage(group_size: int, dtype: torch.dtype) -> None:
    rewards = torch.zeros(3, group_size, dtype=dtype)
    for row in range(3):
        rewards[row, : row + 1] = 1.0
    weights = torch.ones(2, dtype=dtype)
    cancelled = torch.stack([rewards, 1 - rewards], dim=-1)
    for estimator in (gdpo_advantages, dvao_advantages):
        found = estimator(cancelled, weights)
        assert found.dtype == dtype and not found.any()
    # Beside a group that teaches, they are not in the std of the whitening.
    both = torch.cat([cancelled, torch.stack([rewards, rewards], dim=-1)[:1]])
    found = gdpo_advantages(both, weights)
    assert not found[:3].any() and found[3].std().item() == pytest.approx(1.0, rel=1e-5)


# --- the registry ---------------------------------------------------------------------------------


def test_the_configuration_knows_every_estimator() -> None:
    specs = ADVANTAGE_ESTIMATORS
    assert get_args(settings.AdvantageEstimatorName) == tuple(specs)
    assert set(settings.BY_CORRECTNESS) == _names(lambda name: specs[name].needs == {"is_correct"})
    assert set(settings.BEYOND_GROUP) == _names(lambda name: specs[name].looks_beyond_group)
    assert set(settings.GROUP_CENTRED) <= set(specs)
    assert set(settings.BY_REWARD_TERMS) == _names(lambda name: "reward_terms" in specs[name].needs)
    found = {name: torch.cat([estimate(name, random_inputs(seed)) for seed in range(3)]) for name in specs}
    assert set(settings.NEVER_NEGATIVE) == _names(lambda name: bool((found[name] >= 0).all()))
    sections = {spec.settings for spec in specs.values()} - {None}
    for section in sections:
        assert type(getattr(ObjectiveConfig(), str(section))).__module__ == settings.__name__
    own = [v for v in vars(settings).values() if getattr(v, "__module__", "") == settings.__name__]
    assert len(sections) == sum(isinstance(v, type) for v in own)


def _names(holds: Callable[[str], bool]) -> set[str]:
    return {name for name in ADVANTAGE_ESTIMATORS if holds(name)}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("passk", {"passk": {"k": 2}}),
        ("pkpo", {"pkpo": {"k": 2}}),
        ("w_reinforce", {"w_reinforce": {"right_weight": 0.5}}),
        ("riskpo", {"riskpo": {"bundle_size": 1, "cvar_weight": 0.0}}),
    ],
)
def test_settings_reach_the_estimator(name: str, changed: dict[str, Any]) -> None:
    cfg = ObjectiveConfig.model_validate({"advantage_estimator": name, **changed})
    assert not torch.equal(estimate_advantages(random_inputs(), cfg), estimate(name, random_inputs()))


def test_the_table_says_what_the_registry_says() -> None:
    rows = {cells[0].strip("` "): [cell.strip() for cell in cells[1:]] for cells in _table_rows()}
    assert set(rows) == set(ADVANTAGE_ESTIMATORS)
    words = {"is_correct": "right or wrong", "reward_terms": "reward terms", "prompt_ids": "prompts"}
    for name, spec in ADVANTAGE_ESTIMATORS.items():
        _paper, _rule, options, needs, uniform, certainty = rows[name]
        assert bool(spec.settings) == (f"`{spec.settings}." in options), name
        assert needs == ", ".join(words.get(need, need) for need in sorted(spec.needs, reverse=True)), name
        assert (uniform != "no") == (name in TAUGHT_BY_ALL_RIGHT | TAUGHT_BY_ALL_WRONG), name
        assert (name in ("psr", "nsr")) == (not spec.trains_on_zeros), name
        assert certainty[0] in "CSO", name


def _table_rows() -> Iterable[list[str]]:
    section = PAGE.read_text("utf-8").split("## Advantages")[1].split("\n## ")[0]
    for line in re.findall(r"^\| `.*\|$", section, re.MULTILINE)[1:]:  # the first is the header
        yield line.strip("|").split("|")
