"""Scores, mismatch metrics and one corrected update on every layout that two processes can form."""

from __future__ import annotations

from typing import Any

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import ParallelContext, init_parallel


def run_layouts(payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By layout: the scores of whole sequences, and by objective what one update says."""
    return {name: _run_layout(payload, layout) for name, layout in payload["layouts"].items()}


def _run_layout(payload: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    parallel = init_parallel(ParallelConfig(**layout))
    actor = _actor(payload, parallel)
    scores = actor.score([sequence["tokens"].numpy() for sequence in payload["sequences"]])
    return {
        "scores": [score.tolist() for score in scores],
        "dtypes": [str(score.dtype) for score in scores],
        "updates": {
            name: _update(payload, _actor(payload, parallel), ObjectiveConfig(**objective))
            for name, objective in payload["objectives"].items()
        },
    }


def _actor(payload: dict[str, Any], parallel: ParallelContext) -> MegatronActor:
    return MegatronActor(
        ModelConfig(hf_path=payload["model_path"], dtype="float32", make_vocab_size_divisible_by=8),
        OptimizerConfig(clip_grad=0.0),
        parallel,
        micro_batch_size=MicroBatchSize(2),
        num_updates=10,
        temperature=payload["temperature"],
        weight_bucket_bytes=20_000,
    )


def _update(payload: dict[str, Any], actor: MegatronActor, cfg: ObjectiveConfig) -> dict[str, float]:
    """Metrics of one step with one mini-batch, as in training."""
    sequences = [
        TrainingSequence(s["tokens"].numpy(), s["prompt_length"], s["advantage"], s["rollout"].numpy())
        for s in payload["sequences"]
    ]
    objective = build_objective(cfg)
    batch = make_batch(sequences, cfg, actor.parallel, num_mini_batches=1, seed=(0, 0))
    metrics: dict[str, float] = {}
    if cfg.old_log_probs == "recompute":
        batch.sequences = actor.attach_old_log_probs(batch.sequences)
        metrics |= actor.measure_mismatch(batch.sequences, objective)
    with actor.weights_from(actor.snapshot()):
        batch.sequences, _ = actor.attach_reference(batch.sequences, objective)
    return metrics | actor.update(batch.mini_batches()[0], objective)
