"""One step of RL on given sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.config import ObjectiveConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import ParallelContext


def run_one_step(
    actor: MegatronActor,
    parallel: ParallelContext,
    objective_config: ObjectiveConfig,
    sequences: Sequence[TrainingSequence],
    num_mini_batches: int,
    seed: int,
) -> dict[str, Any]:
    """Old log-probs (if they are not the rollout's), reference and the updates.

    ``losses`` and ``grad_norms`` of each update, and ``parameters`` after the last one by checkpoint name, in
    host memory (on rank 0, elsewhere none).

    Collective. The reference is the actor as it comes.
    """
    objective = build_objective(objective_config)
    batch = make_batch(
        sequences, objective_config, parallel, num_mini_batches=num_mini_batches, seed=(seed, 0)
    )
    reference = actor.snapshot()
    if objective_config.old_log_probs == "recompute":
        batch.sequences = actor.attach_old_log_probs(batch.sequences)
    with actor.weights_from(reference):
        batch.sequences, _ = actor.attach_reference(batch.sequences, objective)
    updates = [actor.update(part, objective) for part in batch.mini_batches()]
    parameters: dict[str, torch.Tensor] = {
        name: tensor.cpu().clone() for bucket in actor.weight_source().buckets() for name, tensor in bucket
    }
    return {
        "losses": [update["loss"] for update in updates],
        "grad_norms": [update["grad_norm"] for update in updates],
        "parameters": parameters if parallel.is_main else {},
    }
