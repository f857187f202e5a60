"""One RL step on every layout that the processes can form, in the same processes."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallelConfig

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import ParallelContext, init_parallel


def run_cases(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses, gradient norms and (on rank 0) parameters of every case of ``payload``."""
    results, layout, parallel = [], None, None
    for case in payload["cases"]:
        if case["layout"] != layout:  # new process groups are the slowest part
            layout = case["layout"]
            parallel = init_parallel(ParallelConfig(**layout))
        assert parallel is not None
        results.append(_run_case(payload, case, parallel))
    return results


def _run_case(payload: dict[str, Any], case: dict[str, Any], parallel: ParallelContext) -> dict[str, Any]:
    with mock.patch(  # small buckets, so that tiny models have several
        "apo_megatron.actor.actor.DistributedDataParallelConfig",
        partial(DistributedDataParallelConfig, bucket_size=case.get("bucket_size")),
    ):
        actor = _actor_of(payload, case, parallel)
    objective = build_objective(ObjectiveConfig(**case["objective"]))
    sequences = [
        TrainingSequence(
            np.array(s["tokens"]),
            s["prompt_length"],
            s["advantage"],
            np.zeros(len(s["tokens"]) - s["prompt_length"]),
        )
        for s in payload["sequences"]
    ]
    batch = make_batch(
        sequences,
        ObjectiveConfig(**case["objective"]),
        parallel,
        num_mini_batches=payload["num_mini_batches"],
        seed=(payload["seed"], 0),
    )
    reference = actor.snapshot()
    batch.sequences = actor.attach_old_log_probs(batch.sequences)
    with actor.weights_from(reference):
        batch.sequences, _ = actor.attach_reference(batch.sequences, objective)
    updates = [actor.update(part, objective) for part in batch.mini_batches()]
    parameters = {
        name: tensor.cpu().clone() for bucket in actor.weight_source().buckets() for name, tensor in bucket
    }
    return {
        "losses": [update["loss"] for update in updates],
        "grad_norms": [update["grad_norm"] for update in updates],
        "parameters": parameters if torch.distributed.get_rank() == 0 else {},
    }


def _actor_of(payload: dict[str, Any], case: dict[str, Any], parallel: ParallelContext) -> MegatronActor:
    return MegatronActor(
        ModelConfig(
            hf_path=case.get("model_path", payload["model_path"]),
            dtype=case.get("dtype", "float32"),
            make_vocab_size_divisible_by=8,
            recompute=case.get("recompute", "none"),
            max_logits_mib=case.get("max_logits_mib", 1024),
        ),
        OptimizerConfig(**payload["optimizer"]),
        parallel,
        micro_batch_size=MicroBatchSize(case["micro_batch_size"], case.get("max_tokens")),
        num_updates=10,
    )
