"""Advantage estimators in a step: what is scored, replaced, assigned, trained on and written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apo_megatron.config import ObjectiveConfig, RLConfig
from apo_megatron.data.collate import trained_samples
from apo_megatron.data.prompts import PromptLoader
from apo_megatron.objectives import ADVANTAGE_ESTIMATORS
from apo_megatron.parallel.world import CPUWorld
from apo_megatron.rewards.weighted import WeightedReward
from apo_megatron.rollout.gathering import SampleColumns
from apo_megatron.rollout.groups import assign_advantages, score_groups
from apo_megatron.rollout.sample_records import read_step, step_path, write_step
from apo_megatron.rollout.sampler import GroupSampler, StepSamples
from apo_megatron.types import Completion, Prompt, Sample, SampleGroup
from tests.workers.sampler import PROMPTS_PER_STEP, ScriptedEngine, ScriptedReward, make_config, make_prompts

SOURCE: Any = object()  # the script has no weights
WEIGHTS = (0.75, 0.25)


def config(name: str, **rollout: Any) -> RLConfig:
    values = make_config(**rollout).model_dump()
    values["objective"] |= {
        "advantage_estimator": name,
        "loss_mode": "vanilla",
        "passk": {"k": 2},
        "pkpo": {"k": 2},
        "riskpo": {"bundle_size": 1},
    }
    values["reward"]["rewards"] = [{"name": "countdown", "weight": weight} for weight in WEIGHTS]
    return RLConfig.model_validate(values)


def group_of(rewards: list[float], terms: Sequence[tuple[float, ...]] | None = None) -> SampleGroup:
    samples = []
    for i, reward in enumerate(rewards):
        completion = Completion(
            np.full(i + 1, 3, np.int32), np.zeros(i + 1, np.float32), "", "stop", ((0, i + 1),)
        )
        samples.append(Sample(completion, reward, reward_terms=None if terms is None else terms[i]))
    return SampleGroup(Prompt(f"p{rewards}", "", np.array([7], np.int32)), samples)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("grpo", [0, 1]), ("psr", []), ("nsr", [0, 1]), ("w_reinforce", []), ("passk", [0, 1])],
)
def test_dynamic_sampling_replaces_what_teaches_nothing(name: str, dropped: list[int]) -> None:
    """Prompts 0 and 1 are always solved."""
    engine = ScriptedEngine()
    loader = PromptLoader(make_prompts(), PROMPTS_PER_STEP, seed=0, shuffle=False)
    cfg = config(name, drop_zero_spread=True)
    sampler = GroupSampler(engine, loader, ScriptedReward(lambda row: row > 1), cfg, CPUWorld())
    samples = sampler.next_groups(0, SOURCE)
    assert [prompt.fields["row"] for prompt, _ in samples.dropped] == dropped
    assert (len(engine.generations) > 1) == bool(dropped)
    assign_advantages(samples.groups, cfg)
    num_trained = {"psr": 12, "nsr": 8}.get(name, 16)  # of 16; psr has two groups that are all right
    assert len(trained_samples(samples.groups)) == num_trained


def test_passk_drops_groups_that_are_too_good() -> None:
    """2 of 4 are right: with k = 3 every subset holds a right one, with k = 2 not."""
    groups = [group_of([1.0, 1.0, 0.0, 0.0])]
    assign_advantages(groups, config("passk"))
    assert len(trained_samples(groups)) == 4
    values = config("passk").model_dump()
    values["objective"]["passk"]["k"] = 3
    assign_advantages(groups, RLConfig.model_validate(values))
    assert not trained_samples(groups)


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_every_estimator_fills_a_step(name: str) -> None:
    terms = [(1.0, 0.0), (0.0, 1.0), (math.nan, 1.0), (0.0, 0.0)]
    rewards = [0.75 * a + 0.25 * b for a, b in terms]
    all_wrong = group_of([0.0] * 4, [(0.0, 0.0)] * 4)
    groups = [group_of([rewards[0] + 0.25, *rewards[1:]], terms), all_wrong]
    assign_advantages(groups, config(name))
    found = [[sample.advantage for sample in group.samples] for group in groups]
    assert found[0][2] is None  # not judged
    assert all(value is None or math.isfinite(value) for of_group in found for value in of_group)
    first, second, last = (found[0][i] or 0.0 for i in (0, 1, 3))
    assert first > second >= last
    expected = [-1.0] * 4 if name in ("nsr", "w_reinforce") else [0.0] * 4
    assert found[1] == expected
    num_trained = {"psr": 1, "nsr": 2 + 4, "w_reinforce": 3 + 4}.get(name, 3)
    assert len(trained_samples(groups)) == num_trained


def test_right_is_a_reward_of_1_or_more() -> None:
    groups = [group_of([1.0, 0.9999, 2.0, 0.0])]
    assign_advantages(groups, config("w_reinforce"))
    assert [sample.advantage for sample in groups[0].samples] == pytest.approx([0.1, -1.0, 0.1, -1.0])


def test_terms_are_kept_where_they_are_looked_at() -> None:
    reward = WeightedReward([(ScriptedReward(), WEIGHTS[0]), (ScriptedReward(lambda row: False), WEIGHTS[1])])
    for name in ("grpo", "gdpo"):
        groups = [group_of([math.nan] * 4)]
        groups[0] = SampleGroup(Prompt("", "", groups[0].prompt.token_ids, {"row": 0}), groups[0].samples)
        score_groups(groups, reward, ObjectiveConfig.model_validate({"advantage_estimator": name}))
        samples = groups[0].samples
        assert [sample.reward for sample in samples] == [0.25, 1.0, 0.25, 1.0]
        terms = [(0.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 1.0)]
        assert [sample.reward_terms for sample in samples] == (terms if name == "gdpo" else [None] * 4)
        columns = SampleColumns.of(samples)  # as other ranks get them
        received = columns.samples(np.zeros(10, np.int32), np.zeros(10, np.float32))
        assert [sample.reward_terms for sample in received] == columns.reward_terms
        assert [sample.reward for sample in received] == columns.rewards


def test_a_group_without_advantages_is_named_in_the_files(tmp_path: Path) -> None:
    groups = [group_of([1.0, 1.0, 1.0, 0.0]), group_of([0.0] * 4), group_of([1.0, 0.0, 0.0, 0.0])]
    assign_advantages(groups, config("passk"))
    write_step(tmp_path, 1, StepSamples(groups, {}), {}, keep=0)
    reasons = [record.not_trained for record in read_step(step_path(tmp_path, 1))]
    assert reasons == ["zero_advantage"] * 4 + ["equal_rewards"] * 4 + [None] * 4
    assign_advantages(groups, config("psr"))
    write_step(tmp_path, 2, StepSamples(groups, {}), {}, keep=0)
    of_first = [(r.not_trained, r.advantage) for r in read_step(step_path(tmp_path, 2))][:4]
    assert of_first == [(None, 1.0)] * 3 + [("zero_advantage", None)]
