"""Losses that look at several tokens of the vocabulary: on every layout, and what they are given."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from apo_megatron.actor.forward_step import TokenTerms
from apo_megatron.config import ObjectiveConfig
from apo_megatron.data.collate import make_batch, trained_sequences
from apo_megatron.diagnosis.differences import relative_differences
from apo_megatron.objectives import POLICY_LOSSES, LossInputs, LossOutputs, Objective
from apo_megatron.parallel.vocab import VocabShard
from apo_megatron.types import TrainedTokens
from tests.test_advantages_in_steps import group_of
from tests.tiny_models import make_tiny_model
from tests.update_cases import (
    AGGREGATIONS,
    DEFAULTS,
    LAYOUTS,
    RELATIVE_BOUND,
    check_updates,
    make_sequences,
    plain_update,
)

# So strong that each would show, and bounded so closely that the second update reaches the bounds.
OBJECTIVES: dict[str, dict[str, Any]] = {
    name: {**DEFAULTS, **AGGREGATIONS["token-mean"], "loss_mode": name, "clip_low": 0.01, **settings}
    for name, settings in {
        "simko": {
            "clip_high": 0.01,
            "dual_clip": 1.05,
            "simko": {"topk": 5, "mix": 0.7, "entropy_quantile": 0.4, "wrong_top1_factor": 3.0},
        },
        "topk_forward_kl": {
            "clip_high": 0.02,
            "topk_forward_kl": {"weight": 2.0, "solve_rate_weighting": True},
        },
    }.items()
}
# One after the other, so that each is seen to matter.
WEAKER: list[tuple[str, dict[str, Any]]] = [
    ("simko", {"mix": 0.0}),
    ("simko", {"wrong_top1_factor": 1.0}),
    ("topk_forward_kl", {"weight": 0.0}),
    ("topk_forward_kl", {"solve_rate_weighting": False}),
]
_PACKED, _FUSED = {"max_tokens": 40}, {"max_logits_mib": 0}
# On two processes: where the layout leaves a process, data parallel.
HOW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"micro_batch_size": 1}),
    ({}, {"micro_batch_size": 5, **_FUSED}),
    (LAYOUTS["tp2"], {"micro_batch_size": 2}),
    (LAYOUTS["tp2_sp"], {**_PACKED, **_FUSED}),
    (LAYOUTS["pp2"], _PACKED),
    (LAYOUTS["cp2"], {**_PACKED, **_FUSED}),
]


def _sequences(model_path: str) -> list[dict[str, Any]]:
    """With solve rates; every second wrong answer is what the model holds likeliest."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    sequences = [{**s, "solve_rate": (i % 5) / 5} for i, s in enumerate(make_sequences())]
    for sequence in [s for s in sequences if s["advantage"] < 0][::2]:
        prompt = torch.tensor([sequence["tokens"][: sequence["prompt_length"]]])
        num_tokens = len(sequence["tokens"]) - prompt.shape[1]
        for _ in range(num_tokens):
            with torch.no_grad():
                best = model(prompt).logits[:, -1].argmax(-1, keepdim=True)
            prompt = torch.cat([prompt, best], 1)
        sequence["tokens"] = prompt[0].tolist()
    return sequences


def test_update_equals_plain_torch_on_every_layout(tmp_path: Path) -> None:
    path = str(make_tiny_model(tmp_path, "qwen2"))
    sequences = _sequences(path)
    expected = {name: plain_update(path, sequences, own) for name, own in OBJECTIVES.items()}
    for name, other in WEAKER:  # what is theirs decides something
        section = {name: {**OBJECTIVES[name][name], **other}}
        weaker = plain_update(path, sequences, {**OBJECTIVES[name], **section})
        assert max(relative_differences(weaker, expected[name]).values()) > 100 * RELATIVE_BOUND
    cases = [
        {"model_path": path, "layout": layout, **how, "objective": objective}
        for layout, how in HOW
        for objective in OBJECTIVES.values()
    ]
    check_updates(2, sequences, cases, [*expected.values()] * len(HOW))


# --- what a loss is given -------------------------------------------------------------------------

VOCAB, PADDED, NUM_TOKENS = 6, 8, 40


def seen_by(name: str, **settings: Any) -> tuple[LossInputs, Tensor, Tensor, Tensor]:
    """What the loss gets after a pass over the reference's logits, and by which distributions.

    Log-probs [T, V] of policy and reference, and the targets.
    """
    cfg = ObjectiveConfig(**{"loss_mode": name, **settings})
    generator = torch.Generator().manual_seed(0)
    logits, reference = 2 * torch.randn(2, NUM_TOKENS, PADDED, generator=generator, dtype=torch.float64)
    plain, plain_reference = (x[:, :VOCAB].log_softmax(1) for x in (logits, reference))
    targets = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    seen: list[LossInputs] = []

    def spy(inputs: LossInputs, _: ObjectiveConfig) -> LossOutputs:
        seen.append(inputs)
        return LossOutputs(inputs.log_probs)

    objective = Objective(dataclasses.replace(POLICY_LOSSES[name], function=spy), cfg)
    terms = TokenTerms(VocabShard(0, PADDED, VOCAB), temperature=1.0)
    ones = torch.ones(NUM_TOKENS, dtype=torch.float64)
    tokens = TrainedTokens(torch.zeros_like(targets), targets, -ones, ones)
    found = terms.reference(
        reference,
        tokens,
        objective.support_size,
        cfg.apo_exclude_sampled,
        keep_log_probs=objective.needs_support_log_probs,
    )
    kept = ("support_ids", "anchor_log_mass", "support_log_probs")
    with_reference: dict[str, Any] = {f"reference_{name}": found.get(name) for name in kept}
    terms.loss(objective, logits.requires_grad_(), dataclasses.replace(tokens, **with_reference))
    return seen[0], plain, plain_reference, targets


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("exclusive", [True, False])
def test_the_reference_topk_is_whole_and_the_anchor_support_its_own(exclusive: bool, k: int) -> None:
    """The sampled token is in the Top-K, whether APO's telemetry leaves it out of its support or not."""
    inputs, plain, reference, targets = seen_by("topk_forward_kl", apo_topk=k, apo_exclude_sampled=exclusive)
    values, ids = reference.topk(min(k, VOCAB))
    at_reference, of_reference = inputs.log_probs_at_reference_topk, inputs.reference_topk_log_probs
    assert at_reference is not None and of_reference is not None and at_reference.requires_grad
    torch.testing.assert_close(of_reference[:, :VOCAB], values)
    torch.testing.assert_close(at_reference[:, :VOCAB].detach(), plain.gather(1, ids))
    assert at_reference[:, VOCAB:].isneginf().all() and of_reference[:, VOCAB:].isneginf().all()
    is_left_out = (ids == targets.unsqueeze(1)) & exclusive
    mass = plain.gather(1, ids).masked_fill(is_left_out, -math.inf).logsumexp(1)
    assert inputs.anchor_log_mass is not None and is_left_out.any() == exclusive
    torch.testing.assert_close(inputs.anchor_log_mass.detach(), mass)
    assert inputs.policy_topk_log_probs is inputs.sampled_is_likeliest is None


@pytest.mark.parametrize("telemetry", [True, False])
def test_the_policy_topk_is_that_of_the_logits(telemetry: bool) -> None:
    inputs, plain, _, targets = seen_by("simko", simko={"topk": 4}, support_telemetry=telemetry)
    assert inputs.policy_topk_log_probs is not None and inputs.policy_topk_log_probs.requires_grad
    values, ids = plain.topk(4)
    torch.testing.assert_close(inputs.policy_topk_log_probs.detach(), values)
    assert inputs.sampled_is_likeliest is not None
    assert torch.equal(inputs.sampled_is_likeliest, ids[:, 0] == targets)
    assert (inputs.anchor_log_mass is not None) is telemetry
    assert inputs.log_probs_at_reference_topk is inputs.reference_topk_log_probs is None


def test_other_losses_are_given_nothing_more() -> None:
    for name in ("apo_ratio", "vanilla"):
        inputs = seen_by(name)[0]
        assert inputs.log_probs_at_reference_topk is inputs.reference_topk_log_probs is None
        assert inputs.policy_topk_log_probs is inputs.sampled_is_likeliest is inputs.solve_rates is None


def test_solve_rates_are_those_of_the_judged_answers() -> None:
    groups = [group_of([1.0, 0.5, math.nan, 2.0]), group_of([0.0, 1.0, 0.0, 0.0])]
    for group in groups:
        for i, sample in enumerate(group.samples):
            sample.advantage = None if sample.reward != sample.reward else float(i)
    sequences = trained_sequences(groups)
    assert [s.solve_rate for s in sequences] == [2 / 3] * 3 + [0.25] * 4
    parallel: Any = SimpleNamespace(dims=SimpleNamespace(data=1), data_rank=0)
    for name in ("topk_forward_kl", "simko"):
        batch = make_batch(sequences, ObjectiveConfig(loss_mode=name), parallel, 2, (0, 0))
        rates, mask = batch.sequences.solve_rates, batch.sequences.loss_mask
        assert (rates is not None) == (name == "topk_forward_kl")
        if rates is not None:
            assert rates.shape == mask.shape and rates.dtype == torch.float32
            expected = torch.tensor([sequences[row].solve_rate for row in batch.rows])
            assert torch.equal(rates[:, 0], expected) and torch.equal(rates[:, -1], expected)
