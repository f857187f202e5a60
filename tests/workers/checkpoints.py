"""Saves after one update, goes on; loads in a new actor and takes the same second update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import Batch, TrainingSequence, make_batch
from apo_megatron.errors import CheckpointError
from apo_megatron.objectives.objective import supervised_objective
from apo_megatron.parallel.state import ParallelContext, init_parallel


class NoData:
    """The position of data that has none."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def save_and_resume(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per case the largest difference of any parameter between the two ways, and refusals."""
    return [_save_and_resume(payload, case, index) for index, case in enumerate(payload["cases"])]


def _actor(payload: dict[str, Any], case: dict[str, Any], parallel: ParallelContext) -> MegatronActor:
    model = ModelConfig(hf_path=payload["model_path"], dtype=case["dtype"], make_vocab_size_divisible_by=8)
    optimizer = OptimizerConfig(lr=1e-2, lr_warmup_steps=3, adam_eps=1e-4)
    return MegatronActor(model, optimizer, parallel, micro_batch_size=2, num_updates=10)


def _batch(payload: dict[str, Any], parallel: ParallelContext, step: int) -> Batch:
    sequences = [TrainingSequence(tokens.numpy(), 2) for tokens in payload["sequences"]]
    return make_batch(sequences, ObjectiveConfig(), parallel, num_mini_batches=1, seed=(0, step))


def _parameters(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return {name: t.float().clone() for bucket in actor.weight_source().buckets() for name, t in bucket}


def _save_and_resume(payload: dict[str, Any], case: dict[str, Any], index: int) -> dict[str, Any]:
    parallel = init_parallel(ParallelConfig(**case["layout"]))
    folder, objective = Path(payload["folder"], str(index)), supervised_objective()
    checkpointer = Checkpointer(folder, {"lr": 1.0}, parallel)
    actor = _actor(payload, case, parallel)
    updates_before = case["updates_before"]
    for step in range(updates_before):
        actor.update(_batch(payload, parallel, step).sequences, objective)
    checkpointer.save(updates_before, actor, NoData())
    for step in range(updates_before, updates_before + 2):
        actor.update(_batch(payload, parallel, step).sequences, objective)
    expected = _parameters(actor)

    resumed = _actor(payload, case, parallel)
    start = checkpointer.load_latest(resumed, NoData(), max_step=10)
    for step in range(start, start + 2):
        resumed.update(_batch(payload, parallel, step).sequences, objective)
    found = _parameters(resumed)
    refusals = []
    for other, max_step in ((Checkpointer(folder, {"lr": 2.0}, parallel), 10), (checkpointer, -1)):
        try:
            other.load_latest(resumed, NoData(), max_step)
        except CheckpointError as error:
            refusals.append(str(error))
    return {
        "start": start,
        "difference": max(float((found[name] - value).abs().max()) for name, value in expected.items()),
        "refusals": refusals,
    }
