"""Samples that a filter leaves out: in no batch and no denominator, and named in the files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from apo_megatron.config import RLConfig
from apo_megatron.data.collate import make_batch, trained_samples, trained_sequences
from apo_megatron.rollout.filtering import filter_samples
from apo_megatron.rollout.groups import assign_advantages
from apo_megatron.rollout.sample_records import read_step, step_path, write_step
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.types import SampleGroup
from tests.test_advantages_in_steps import config, group_of
from tests.test_bounded_ratio_in_steps import ONE_RANK


def config_of(num_steps: int = 3, **rollout: Any) -> RLConfig:
    values = config("dr_grpo").model_dump()
    values["rollout"] |= {"sample_filter": "d3s", "d3s": {"first_share": 0.5}} | rollout
    values["train"] |= {"num_steps": num_steps}
    return RLConfig.model_validate(values)


def scored(cfg: RLConfig) -> list[SampleGroup]:
    groups = [
        group_of([1.0, 0.0, 0.0, 0.0]),  # 0.75, -0.25 thrice
        group_of([1.0, 1.0, 1.0, 0.0]),  # 0.25 thrice, -0.75
        group_of([0.0, 0.0, 0.0, 0.0]),  # nothing to learn
        group_of([1.0, 0.0, math.nan, 0.0]),  # 2/3, -1/3, not judged, -1/3
    ]
    assign_advantages(groups, cfg)
    return groups


def test_in_every_step_more_are_kept_and_in_the_last_all() -> None:
    cfg = config_of()
    groups = scored(cfg)
    for step, num_kept in enumerate((6, 9, 11)):  # of 11: 5.5, 8.25 and 11
        metrics = filter_samples(groups, cfg, step)
        assert metrics == {"rollout/num_samples_filtered_out": 11.0 - num_kept}
        assert len(trained_samples(groups)) == num_kept
        for group in groups:
            for sample in group.samples:
                sample.is_filtered_out = False
    filter_samples(groups, cfg, 0)
    kept = sorted(sample.advantage or 0.0 for _, sample in trained_samples(groups))
    torch.testing.assert_close(
        torch.tensor(kept), torch.tensor([-0.75, -1 / 3, -1 / 3, 0.25, 2 / 3, 0.75]), rtol=1e-6, atol=1e-6
    )


def kept_of_equal_prompts(step: int, seed: int = 0) -> list[tuple[int, int, bool]]:
    """(prompt, sample, whether it is right) of what is kept of 32 prompts with the same solve rate."""
    cfg = config_of(num_steps=10**12)  # the share hardly grows
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seed": seed})})
    groups = [group_of([1.0, 0.0, 1.0, 0.0]) for _ in range(32)]
    assign_advantages(groups, cfg)
    filter_samples(groups, cfg, step)
    return [
        (number, place, sample.reward == 1.0)
        for number, group in enumerate(groups)
        for place, sample in enumerate(group.samples)
        if not sample.is_filtered_out
    ]


def test_of_equal_samples_the_place_does_not_decide() -> None:
    kept = kept_of_equal_prompts(step=0)
    assert len(kept) == 64
    for is_half in (lambda number: number < 16, lambda number: number >= 16):
        right = sum(is_right for number, _, is_right in kept if is_half(number))
        wrong = sum(not is_right for number, _, is_right in kept if is_half(number))
        assert 8 <= right <= 24 and 8 <= wrong <= 24  # 16 expected; by place 0 and 32
    assert kept == kept_of_equal_prompts(step=0)  # on every rank, and after a resume
    for other in (kept_of_equal_prompts(step=1), kept_of_equal_prompts(step=0, seed=1)):
        assert len(other) == 64 and other != kept


def test_what_is_left_out_is_in_no_denominator() -> None:
    cfg = config_of()
    groups = scored(cfg)
    filter_samples(groups, cfg, 0)
    sequences = trained_sequences(groups)
    batch = make_batch(sequences, cfg.objective, ONE_RANK, 1, seed=(0, 0)).sequences
    assert batch.num_sequences == len(sequences) == 6
    num_tokens = sum(len(sample.completion.token_ids) for _, sample in trained_samples(groups))
    torch.testing.assert_close(batch.loss_weights[batch.loss_mask], torch.full((num_tokens,), 1 / num_tokens))


def test_without_a_filter_nothing_changes() -> None:
    cfg = config_of(sample_filter="none")
    groups = scored(cfg)
    before = trained_samples(groups)
    assert filter_samples(groups, cfg, 0) == {"rollout/num_samples_filtered_out": 0.0}
    assert trained_samples(groups) == before and len(before) == 11
    nothing = scored(cfg)[2:3]
    assert filter_samples(nothing, config_of(), 0) == {"rollout/num_samples_filtered_out": 0.0}


def test_the_files_say_who_left_it_out(tmp_path: Path) -> None:
    cfg = config_of()
    groups = scored(cfg)
    filter_samples(groups, cfg, 0)
    write_step(tmp_path, 1, StepSamples(groups, {}), {}, keep=0)
    reasons = [record.not_trained for record in read_step(step_path(tmp_path, 1))]
    assert reasons.count("filtered_out") == 5 and reasons.count(None) == 6
    assert reasons[8:12] == ["equal_rewards"] * 4 and reasons[14] == "unjudged"
