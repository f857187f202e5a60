"""A setting that changes nothing is named: what each method reads is declared, and declared truly."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from apo_megatron.config import ObjectiveConfig, RLConfig, RolloutConfig
from apo_megatron.config.sampling import D3SConfig, KnapsackConfig
from apo_megatron.objectives import (
    ADVANTAGE_ESTIMATORS,
    MISMATCH_CORRECTIONS,
    POLICY_LOSSES,
    LossInputs,
    MiniBatchInputs,
    WholeSequences,
)
from apo_megatron.objectives.unread_settings import unread_settings, with_unread_at_defaults

CHOSEN_FROM = {"loss_mode", "advantage_estimator", "mismatch_correction"}
FIELDS = sorted({*ObjectiveConfig.model_fields} - CHOSEN_FROM)


def run_with(objective: ObjectiveConfig | None = None, rollout: RolloutConfig | None = None) -> RLConfig:
    """Unchecked: not every combination of a field and a choice is a run that could be started."""
    values = {"objective": objective or ObjectiveConfig(), "rollout": rollout or RolloutConfig()}
    return RLConfig.model_construct(**values)  # type: ignore[arg-type]


class Recorder:
    """Settings that remember what of them was read."""

    def __init__(self, cfg: ObjectiveConfig) -> None:
        self.read: set[str] = set()
        self._cfg = cfg

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._cfg, name)


def everything(num_tokens: int = 24) -> LossInputs:
    """Whatever a loss may need but statistics: three answers, of both signs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(num_tokens) // 8

    def draw(*shape: int) -> torch.Tensor:
        return -3 * torch.rand(num_tokens, *shape, generator=generator, dtype=torch.float64)

    return LossInputs(
        log_probs=draw(),
        old_log_probs=draw(),
        advantages=torch.tensor([-1.0, 1.0, -0.5], dtype=torch.float64)[ids],
        entropy=-draw(),
        sequence_ids=ids,
        anchor_log_mass=draw(),
        reference_anchor_log_mass=draw(),
        reference_log_probs=draw(),
        rollout_log_probs=draw(),
        sampled_in_support=torch.ones(num_tokens, dtype=torch.bool),
        sequences=WholeSequences.all_here(ids),
        reference_topk_log_probs=draw(3),
        log_probs_at_reference_topk=draw(3),
        policy_topk_log_probs=draw(3).sort(descending=True).values,
        sampled_is_likeliest=torch.zeros(num_tokens, dtype=torch.bool),
        solve_rates=-draw() / 3,
        target_advantages=draw(),
    )


def read_by_loss(name: str) -> set[str]:
    """The fields of ``objective`` that the loss looks at, and its statistics."""
    spec, inputs = POLICY_LOSSES[name], everything()
    recorder: Any = Recorder(ObjectiveConfig(dual_clip=3.0))
    if spec.statistics is not None:
        mini_batch = MiniBatchInputs(
            log_probs=inputs.log_probs,
            old_log_probs=inputs.old_log_probs,
            advantages=inputs.advantages,
            sequence_ids=inputs.sequence_ids,
            draw_seeds=torch.arange(3),
            groups=torch.zeros(3, dtype=torch.int64),
            sum=lambda values: values,
            gather=lambda values: values,
        )
        inputs = dataclasses.replace(inputs, statistics=spec.statistics.compute(mini_batch, recorder))
    spec.function(inputs, recorder)
    return recorder.read


@pytest.mark.parametrize("name", sorted({*POLICY_LOSSES} - {"supervised"}))
def test_a_loss_reads_what_it_declares_and_its_own_section(name: str) -> None:
    spec = POLICY_LOSSES[name]
    declared = spec.reads | {spec.settings} - {None}
    assert read_by_loss(name) == declared, "the registry declares settings=... and reads=..."


@pytest.mark.parametrize("name", list(MISMATCH_CORRECTIONS))
def test_a_correction_reads_what_it_declares(name: str) -> None:
    recorder: Any = Recorder(ObjectiveConfig())
    sequences = WholeSequences.all_here(torch.tensor([0, 0, 1]))
    MISMATCH_CORRECTIONS[name].function(torch.tensor([0.4, 1.0, 3.0]), recorder, sequences)
    assert recorder.read == MISMATCH_CORRECTIONS[name].reads


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({}, []),
        ({"clip_high": 0.4, "apo_pull_coeff": 0.15, "apo_topk": 4}, []),
        ({"loss_mode": "vanilla", "apo_pull_coeff": 0.15, "clip_high": 0.4}, ["apo_pull_coeff"]),
        ({"loss_mode": "cispo", "clip_high": 0.4, "cispo": {"clip_high": 2.0}}, ["clip_high"]),
        ({"loss_mode": "ctpo", "dual_clip": 3.0}, ["dual_clip"]),
        ({"loss_mode": "gspo", "cispo": {"clip_high": 2.0}, "gspo": {"clip_low": 0.1}}, ["cispo"]),
        ({"loss_mode": "dcpo_clip", "dcpo": {"clip_low": 0.1}}, []),
        ({"advantage_estimator": "dcpo", "dcpo": {"clip_low": 0.1}}, ["dcpo"]),
        ({"advantage_estimator": "passk", "passk": {"k": 2}, "pkpo": {"k": 2}}, ["pkpo"]),
        ({"kl_loss_coeff": 0.5}, ["kl_loss_coeff"]),
        ({"kl_loss_coeff": 0.5, "use_kl_loss_on_wrong": True}, []),
        ({"mismatch_correction": "icepop", "icepop_low": 0.1, "tis_cap": 4.0}, ["tis_cap"]),
        ({"loss_mode": "vanilla", "support_telemetry": False, "apo_topk": 4}, ["apo_topk"]),
        ({"support_telemetry": False}, ["support_telemetry"]),
        ({"loss_mode": "gspo", "dual_clip": 1.2, "clip_high": 0.1}, ["clip_high"]),
    ],
)
def test_what_nothing_reads_is_named(settings: dict[str, Any], unread: list[str]) -> None:
    found = unread_settings(run_with(ObjectiveConfig(**settings)))
    assert found == [f"objective.{name}" for name in unread]


def test_what_no_choice_of_samples_reads_is_named() -> None:
    rollout = RolloutConfig(d3s=D3SConfig(first_share=0.3), knapsack=KnapsackConfig(max_samples=64))
    assert unread_settings(run_with(rollout=rollout)) == ["rollout.d3s", "rollout.knapsack"]
    chosen = rollout.model_copy(update={"sample_filter": "d3s", "allocation": "knapsack"})
    assert unread_settings(run_with(rollout=chosen)) == []


def test_what_trains_alike_is_the_same() -> None:
    plain = ObjectiveConfig(loss_mode="cispo")
    more = ObjectiveConfig(loss_mode="cispo", clip_high=0.4, dcpo={"clip_low": 0.1})  # type: ignore[arg-type]
    assert with_unread_at_defaults(more) == with_unread_at_defaults(plain) == plain
    assert with_unread_at_defaults(read := ObjectiveConfig(clip_high=0.4)) == read


CHOICES: list[dict[str, Any]] = [
    {"use_kl_loss": True},
    *({"loss_mode": name} for name in POLICY_LOSSES if name != "supervised"),
    *({"advantage_estimator": name} for name in ADVANTAGE_ESTIMATORS),
    *({"mismatch_correction": name} for name in MISMATCH_CORRECTIONS),
]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read_under_some_choice(field: str) -> None:
    """Else a new one would be called without effect, whatever is chosen."""
    configs = [ObjectiveConfig().model_copy(update={field: 0.123, **choice}) for choice in CHOICES]
    assert not all(f"objective.{field}" in unread_settings(run_with(cfg)) for cfg in configs)
