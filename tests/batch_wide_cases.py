"""Mini-batches for the losses that look at one as a whole, and several ranks in one process."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives import (
    POLICY_LOSSES,
    LossInputs,
    LossOutputs,
    MiniBatchInputs,
)
from tests.plain_batch_losses import PLAIN_BATCH_LOSSES, Answer

NAMES = tuple(PLAIN_BATCH_LOSSES)
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "narrow": {
        "clip_low": 0.05,
        "clip_high": 0.03,
        "dual_clip": 3.0,
        "clip_cov": {
            "share": 0.1,
            "covariance_low": 0.1,
            "covariance_high": 2.0,
            "clip_low": 0.05,
            "clip_high": 0.03,
        },
        "kl_cov": {"share": 0.15, "coeff": 0.7},
        "bapo": {"target": 0.8, "low_start": 0.6, "low_max": 0.7, "low_step": 0.04, "high_max": 4.0},
        "dmpo": {"coeff": 1.5, "temperature": 0.5},
    },
}


def make_answers(distance: float, seed: int = 0) -> list[Answer]:
    """12 answers to 4 prompts, ``distance`` from the old policy; a third each with A < 0, = 0 and > 0."""
    rng = np.random.default_rng(seed)
    answers = []
    for i in range(12):
        old = -torch.from_numpy(rng.exponential(2.0, int(rng.integers(1, 40))))
        moved = (old + distance * torch.from_numpy(rng.standard_normal(len(old)))).clamp(max=0.0)
        answers.append(
            Answer(
                moved.requires_grad_(),
                old,
                advantage=(-1, 0, 1)[i % 3] * float(rng.uniform(0.5, 2)),
                group=i % 4,
                seed=int(rng.integers(2**63)),
            )
        )
    return answers


def flat(answers: Sequence[Answer]) -> LossInputs:
    """Their tokens, one answer after the other; gradients go to the log-probs of the answers."""
    lengths = torch.tensor([len(a.log_probs) for a in answers], dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.float64)
    log_probs = torch.cat([none, *(a.log_probs for a in answers)])
    return LossInputs(
        log_probs=log_probs if log_probs.requires_grad else log_probs.requires_grad_(),
        old_log_probs=torch.cat([none, *(a.old_log_probs for a in answers)]),
        advantages=torch.tensor([a.advantage for a in answers], dtype=torch.float64).repeat_interleave(
            lengths
        ),
        entropy=torch.zeros_like(log_probs),
        sequence_ids=torch.arange(len(answers)).repeat_interleave(lengths),
    )


def mini_batch_inputs(
    answers: Sequence[Answer],
    add: Callable[[Tensor], Tensor] = lambda values: values,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> MiniBatchInputs:
    tokens = flat(answers)
    return MiniBatchInputs(
        log_probs=tokens.log_probs.detach(),
        old_log_probs=tokens.old_log_probs,
        advantages=tokens.advantages,
        sequence_ids=tokens.sequence_ids,
        draw_seeds=torch.tensor([a.seed for a in answers], dtype=torch.int64),
        groups=torch.tensor([a.group for a in answers], dtype=torch.int64),
        sum=add,
        gather=gather,
    )


def config_of(name: str, settings: dict[str, Any]) -> ObjectiveConfig:
    return ObjectiveConfig(**{"loss_mode": name, "support_telemetry": False, **settings})


def statistics(name: str, inputs: MiniBatchInputs, cfg: ObjectiveConfig) -> dict[str, Tensor]:
    spec = POLICY_LOSSES[name].statistics
    assert spec is not None
    found = spec.compute(inputs, cfg)
    assert tuple(found) == spec.names and all(len(v) == len(inputs.log_probs) for v in found.values())
    return found


def with_statistics(name: str, answers: Sequence[Answer], cfg: ObjectiveConfig) -> LossInputs:
    found = statistics(name, mini_batch_inputs(answers), cfg)
    return dataclasses.replace(flat(answers), statistics=found)


def evaluate(name: str, answers: Sequence[Answer], **settings: Any) -> tuple[Tensor, Tensor, LossOutputs]:
    """Loss [T], its gradient [T] with respect to the log-probs, and all outputs."""
    cfg = config_of(name, settings)
    inputs = with_statistics(name, answers, cfg) if name in NAMES else flat(answers)
    outputs = POLICY_LOSSES[name].function(inputs, cfg)
    (slopes,) = torch.autograd.grad(outputs.loss.sum(), inputs.log_probs, retain_graph=True)
    return outputs.loss.detach(), slopes, outputs


def on_ranks(
    parts: Sequence[Sequence[Answer]], work: Callable[[MiniBatchInputs], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """``work`` on each of several data-parallel ranks, which wait for each other as processes would."""
    barrier, box = threading.Barrier(len(parts), timeout=5), [torch.zeros(0)] * len(parts)
    results: list[dict[str, Tensor]] = [{} for _ in parts]

    def run(rank: int) -> None:
        def exchange(values: Tensor) -> list[Tensor]:
            box[rank] = values
            barrier.wait()
            everywhere = list(box)
            barrier.wait()
            return everywhere

        results[rank] = work(
            mini_batch_inputs(
                parts[rank],
                add=lambda values: torch.stack(exchange(values)).sum(0),
                gather=lambda values: torch.cat(exchange(values)),
            )
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
