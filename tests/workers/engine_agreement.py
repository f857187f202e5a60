"""The embedded engine fed by the sharded actor: the same log-probs, and new weights after an update."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from apo_megatron.data.collate import Batch, TrainingSequence, make_batch
from apo_megatron.errors import RolloutError
from apo_megatron.objectives.objective import supervised_objective
from apo_megatron.parallel.collectives import broadcast_from_last_stage
from apo_megatron.parallel.state import ParallelContext, init_parallel
from apo_megatron.rollout.build import build_embedded_engine
from apo_megatron.rollout.engine import Probe, SamplingParams
from apo_megatron.types import Completion, Prompt


def compare(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per layout: largest log-prob gap before and after updates, and what the updates did to the samples."""
    return [_compare(payload, layout) for layout in payload["layouts"]]


def _compare(payload: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    parallel = init_parallel(ParallelConfig(**layout))
    model_cfg = ModelConfig(hf_path=payload["model_path"], dtype="float32", make_vocab_size_divisible_by=8)
    temperature = payload["temperature"]
    actor = MegatronActor(
        model_cfg,
        OptimizerConfig(lr=5e-3),
        parallel,
        micro_batch_size=MicroBatchSize(4),
        num_updates=100,
        temperature=temperature,
    )
    engine = build_embedded_engine(RolloutConfig(max_new_tokens=8), model_cfg, parallel.device)
    prompts = [
        Prompt(str(i), "", np.array(tokens, dtype=np.int32)) for i, tokens in enumerate(payload["prompts"])
    ]
    sampling = SamplingParams(4, temperature, 1.0, 0, 8, (), seed=3)

    probe_tokens = tuple(prompt.token_ids for prompt in prompts if len(prompt.token_ids) > 1)
    canary_gaps = []

    def sample(version: int) -> tuple[list[list[Completion]], float]:
        probe = Probe(probe_tokens, tuple(actor.score(probe_tokens)))
        canary_gaps.append(engine.update_weights(actor.weight_source(), version, probe)["canary_gap"])
        completions = engine.generate(prompts, sampling)
        assert all(c.policy_version == version for group in completions for c in group)
        return completions, _largest_gap(actor, parallel, prompts, completions)

    before, gap_before = sample(0)
    probe_before = Probe(probe_tokens, tuple(actor.score(probe_tokens)))
    favoured = TrainingSequence(
        np.array([*payload["prompts"][0], *payload["favoured"]]), len(payload["prompts"][0])
    )
    for step in range(payload["num_updates"]):
        actor.update(_batch([favoured] * 4, parallel, step).sequences, supervised_objective())
    stale = engine.generate(prompts, sampling)  # the engine has not heard of the updates yet
    after, gap_after = sample(1)
    try:  # as if the update had not arrived, on one rank
        probe_now = Probe(probe_tokens, tuple(actor.score(probe_tokens)))
        is_late = parallel.rank == parallel.world - 1
        engine.update_weights(actor.weight_source(), 2, probe_before if is_late else probe_now)
        refused = ""
    except RolloutError as error:
        refused = str(error)
    return {
        "canary_gaps": canary_gaps,
        "refused": refused,
        "gap_before": gap_before,
        "gap_after": gap_after,
        "stale_is_unchanged": [c.token_ids.tolist() for c in stale[0]]
        == [c.token_ids.tolist() for c in before[0]],
        "favoured_after": [c.token_ids.tolist() for c in after[0]],
    }


def _batch(sequences: list[TrainingSequence], parallel: ParallelContext, step: int) -> Batch:
    return make_batch(sequences, ObjectiveConfig(), parallel, num_mini_batches=1, seed=(0, step))


def _largest_gap(
    actor: MegatronActor,
    parallel: ParallelContext,
    prompts: list[Prompt],
    completions: list[list[Completion]],
) -> float:
    sequences = [
        TrainingSequence(
            np.concatenate([prompt.token_ids, completion.token_ids]),
            len(prompt.token_ids),
            1.0,
            completion.log_probs,
        )
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]
    found = actor.attach_old_log_probs(_batch(sequences, parallel, 0).sequences)
    gap = 0.0
    if found.old_log_probs is not None:
        assert found.rollout_log_probs is not None
        difference = found.old_log_probs - found.rollout_log_probs
        gap = float(torch.where(found.loss_mask, difference.abs(), 0.0).max())
    return broadcast_from_last_stage(gap, parallel)
