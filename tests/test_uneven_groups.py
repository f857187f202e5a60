"""Groups of different sizes, as knapsack draws them: every strategy of drawing, and every estimator."""

from __future__ import annotations

import math
from typing import Any

import pytest

from apo_megatron.config import RLConfig
from apo_megatron.config.advantages import GROUP_CENTRED
from apo_megatron.data.collate import trained_samples
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.objectives import ADVANTAGE_ESTIMATORS
from apo_megatron.objectives.sample_allocations import knapsack
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.rollout.groups import assign_advantages, group_metrics, groups_that_teach
from apo_megatron.rollout.sampler import GroupSampler
from tests.test_advantages_in_steps import config, group_of
from tests.workers.sampler import (
    GROUP_SIZE,
    PROMPTS_PER_STEP,
    STRATEGIES,
    ScriptedEngine,
    ScriptedReward,
    make_config,
    make_prompts,
)

SOURCE: Any = object()  # the script has no weights
KNAPSACK = {"allocation": "knapsack", "knapsack": {"min_samples": 2, "max_samples": 7}}
OF_THE_BATCH = ("reinforce_plus_plus_baseline", "gdpo", "riskpo")  # statistics over all prompts


def drawn(
    strategy: str, steps: range, state: dict[str, Any] | None = None
) -> tuple[list[list[tuple[str, int]]], dict[str, Any], RLConfig]:
    """Of each step its prompts and the sizes of their groups; what a checkpoint would hold; the settings."""
    cfg = make_config(**STRATEGIES[strategy], **KNAPSACK)
    loader = PromptLoader(make_prompts(9), PROMPTS_PER_STEP, seed=0, shuffle=False)
    engine = ScriptedEngine(policy_version=steps.start)
    sampler = GroupSampler(engine, loader, ScriptedReward(lambda row: row % 3 != 0), cfg, CPUWorld())
    if state is not None:
        loader.load_state_dict(state["data"])
        sampler.load_state_dict(state["sampler"])
    sizes = []
    for step in steps:
        samples = sampler.next_groups(step, SOURCE)
        assign_advantages(samples.groups, cfg)
        sizes.append([(group.prompt.prompt_id, len(group.samples)) for group in samples.groups])
        assert samples.metrics["rollout/largest_group"] == max(count for _, count in sizes[-1])
        with sampler.settled():
            engine.update_weights(None, step + 1)
    return sizes, {"data": loader.state_dict(), "sampler": sampler.state_dict()}, cfg


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_draws_what_was_allocated(strategy: str) -> None:
    sizes, state, cfg = drawn(strategy, range(12))
    counts = [count for of_step in sizes for _, count in of_step]
    assert GROUP_SIZE < max(counts) <= 7
    # What is always solved gets fewest, and is not trained on with dynamic sampling.
    assert cfg.rollout.drop_zero_spread or min(counts) == 2
    rates = state["sampler"]["solve_rates"]
    assert len(rates) == 9 and set(rates["p0"]) == {"1"}
    assert 0.3 < rates["p1"].count("1") / len(rates["p1"]) < 0.7
    assert drawn(strategy, range(12))[0] == sizes


def test_a_step_spends_its_budget_where_it_teaches() -> None:
    sizes, state, cfg = drawn("plain", range(8))
    counts = [[count for _, count in of_step] for of_step in sizes]
    assert all(sum(of_step) == GROUP_SIZE * PROMPTS_PER_STEP for of_step in counts)
    assert counts[:4] == [[GROUP_SIZE] * PROMPTS_PER_STEP] * 4  # nobody was seen twice
    # The fifth step: p7 and p8, seen once, then p0 (always right) and p1 (half of 8 right).
    assert sizes[4] == [("p7", 4), ("p8", 4), ("p0", 2), ("p1", 6)]
    assert counts[4] == knapsack([None, None, 1.0, 0.5], cfg.rollout)
    # 14 answers of p1, of which every second is right, and what follows from it in a run that goes on.
    half = drawn("plain", range(5))
    assert half[1]["sampler"]["solve_rates"]["p1"] == "01" * 7
    rest, end, _ = drawn("plain", range(5, 8), half[1])
    assert half[0] + rest == sizes and end == state


@pytest.mark.parametrize(
    ("name", "loss_mode"),
    [
        (name, loss_mode)
        for name in ADVANTAGE_ESTIMATORS
        for loss_mode in ("vanilla", "gbpo")
        if name not in OF_THE_BATCH and (loss_mode != "gbpo" or name in GROUP_CENTRED)
    ],
)
def test_a_small_group_among_large_ones_is_as_it_would_be_alone(name: str, loss_mode: str) -> None:
    values = config(name, mask_truncated=True).model_dump()
    values["objective"]["loss_mode"] = loss_mode
    cfg = RLConfig.model_validate(values)
    rewards = [[1.0, 0.0], [0.0, 1.0, 1.0, math.nan, 0.0, 0.0], [0.0, 0.0, 1.0]]
    terms = [[(0.75 * r, 0.25 * i) for i, r in enumerate(row)] for row in rewards]
    together = [group_of(row, of_row) for row, of_row in zip(rewards, terms, strict=True)]
    alone = [group_of(row, of_row) for row, of_row in zip(rewards, terms, strict=True)]
    assign_advantages(together, cfg)
    for group in alone:
        assign_advantages([group], cfg)
    for one, other in zip(together, alone, strict=True):
        for found, expected in zip(one.samples, other.samples, strict=True):
            pairs = [(s.advantage, s.target_advantage) for s in (found, expected)]
            assert str(pairs[0]) == str(pairs[1])  # None, too
    assert len(trained_samples(together)) == len(trained_samples(alone))
    assert groups_that_teach(together, cfg) == [groups_that_teach([group], cfg)[0] for group in alone]
    assert group_metrics(together, cfg)["unjudged_share"] == pytest.approx(1 / 11)


@pytest.mark.parametrize("name", ["reinforce_plus_plus_baseline", "gdpo"])
def test_statistics_of_the_batch_do_not_see_what_is_filled_up(name: str) -> None:
    cfg = config(name)
    rewards = [[1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    filled = [[1.0, 0.0, math.nan, math.nan], rewards[1]]
    found, expected = (
        [group_of(row, [(r, 0.5 * r) for r in row]) for row in rows] for rows in (rewards, filled)
    )
    assign_advantages(found, cfg)
    assign_advantages(expected, cfg)
    for one, other in zip(found, expected, strict=True):
        assert [s.advantage for s in one.samples] == [s.advantage for s in other.samples[: len(one.samples)]]
