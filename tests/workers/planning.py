"""Memory that an actor really takes on every rank of a gloo world, for the planner to be held against."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.actor.offload import TrainingStateOffload
from apo_megatron.config import RLConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import init_parallel
from tests.test_lm_head import peak_bytes


def measure(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes of this rank for every config of ``payload`` (all of one layout)."""
    return [_measure(RLConfig.model_validate(values)) for values in payload["configs"]]


def _measure(cfg: RLConfig) -> dict[str, Any]:
    parallel = init_parallel(cfg.parallel)
    size = MicroBatchSize(cfg.train.micro_batch_size, cfg.train.max_tokens_per_micro_batch)
    actor = MegatronActor(cfg.model, cfg.optimizer, parallel, size, num_updates=10)
    objective = build_objective(cfg.objective)
    batch = make_batch(_sequences(cfg), cfg.objective, parallel, 1, seed=(0, 0))
    with actor.weights_from(actor.snapshot()):
        batch.sequences, _ = actor.attach_reference(batch.sequences, objective)
    (mini_batch,) = batch.mini_batches()
    actor.update(mini_batch, objective)  # the optimizer's moments exist from now on
    peak = peak_bytes(lambda: actor.update(mini_batch, objective))
    parameters = [p for chunk in actor.model_chunks for p in chunk.parameters()]
    buffers = [b for c in actor.model_chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    state = TrainingStateOffload(actor.model_chunks, actor.optimizer)
    return {
        "weights": _storage_bytes(parameters),
        "gradients": _storage_bytes(buffer.grad_data for buffer in buffers),
        "optimizer": sum(storage.nbytes() for storage in state._storages()),
        "reference": sum(p.numel() * p.element_size() for p in parameters),
        "peak": peak,
        "pipeline_rank": parallel.pipeline_rank,
    }


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _sequences(cfg: RLConfig) -> list[TrainingSequence]:
    """A step's sequences, all of the greatest length, half of them wrong."""
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_new_tokens
    generator = np.random.default_rng(0)
    return [
        TrainingSequence(
            generator.integers(2, 100, prompt + response),
            prompt,
            1.0 if i % 2 else -1.0,
            np.zeros(response),
        )
        for i in range(cfg.data.prompts_per_step * cfg.rollout.group_size)
    ]
