"""One RL step on every layout that the processes can form, in the same processes."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from megatron.core.distributed import DistributedDataParallelConfig

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.forward_step import run_forward
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import TrainingSequence
from apo_megatron.diagnosis.one_step import run_one_step
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


def count_passes(payload: dict[str, Any]) -> list[int]:
    """Passes without gradients in one step of each case."""
    counts = []
    for case in payload["cases"]:
        with mock.patch("apo_megatron.actor.actor.run_forward", wraps=run_forward) as spy:
            _run_case(payload, case, init_parallel(ParallelConfig(**case["layout"])))
        counts.append(spy.call_count)
    return counts


def _run_case(payload: dict[str, Any], case: dict[str, Any], parallel: ParallelContext) -> dict[str, Any]:
    with mock.patch(  # small buckets, so that tiny models have several
        "apo_megatron.actor.data_parallel.DistributedDataParallelConfig",
        partial(DistributedDataParallelConfig, bucket_size=case.get("bucket_size")),
    ):
        actor = _actor_of(payload, case, parallel)
    sequences = [
        TrainingSequence(
            np.array(s["tokens"]),
            s["prompt_length"],
            s["advantage"],
            np.array(s.get("rollout", [0.0] * (len(s["tokens"]) - s["prompt_length"]))),
            s.get("solve_rate"),
            group=s.get("group", -1),
            target_advantage=s.get("target_advantage"),
        )
        for s in payload["sequences"]
    ]
    return run_one_step(
        actor,
        parallel,
        ObjectiveConfig(**case["objective"]),
        sequences,
        payload["num_mini_batches"],
        payload["seed"],
    )


def _actor_of(payload: dict[str, Any], case: dict[str, Any], parallel: ParallelContext) -> MegatronActor:
    return MegatronActor(
        ModelConfig(
            hf_path=case["model_path"],
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
