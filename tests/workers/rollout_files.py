"""One RL step with its file of samples, on several layouts in the same processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, TrainConfig
from apo_megatron.data.collate import make_batch, trained_sequences
from apo_megatron.objectives.objective import build_objective
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.sampler import StepSamples
from apo_megatron.rollout.step_files import StepFiles
from apo_megatron.types import Completion, Prompt, Sample, SampleGroup


def write_files(payload: dict[str, Any]) -> None:
    """The files of payload["folder"], one run_dir a layout. The learning rate changes no weight."""
    for name, layout in payload["layouts"].items():
        parallel = init_parallel(ParallelConfig(**layout))
        cfg = ObjectiveConfig(**payload["objective"])

        def actor_of(path: str) -> MegatronActor:
            model = ModelConfig(hf_path=path, dtype="float32", make_vocab_size_divisible_by=8)
            size, optimizer = MicroBatchSize(2), OptimizerConfig(lr=1e-12)
            return MegatronActor(model, optimizer, parallel, size, num_updates=10)  # noqa: B023

        objective, reference = build_objective(cfg), actor_of(payload["reference"])
        actor = actor_of(payload["model"])
        groups = [_group(group) for group in payload["groups"]]
        batch = make_batch(trained_sequences(groups), cfg, parallel, num_mini_batches=3, seed=(5, 0))
        batch.sequences, _ = reference.attach_reference(batch.sequences, objective)
        if "advantage_factor" in payload:
            broken = batch.sequences.advantages * payload["advantage_factor"]
            batch.sequences = batch.sequences.with_fields(advantages=broken)
        for part in batch.mini_batches():
            actor.update(part, objective, take_pulled=batch.pulled.append)
        run_dir = Path(payload["folder"], name)
        run_dir.mkdir(exist_ok=True)
        train = TrainConfig(run_dir=str(run_dir), num_steps=1)
        files = StepFiles(train, parallel, after_step=0, note=print)
        files.save(1, StepSamples(groups, {}), batch)
        files.finish()


def _group(group: dict[str, Any]) -> SampleGroup:
    samples = [
        Sample(
            Completion(
                np.array(s["token_ids"], np.int32),
                np.array(s["log_probs"], np.float32),
                "",
                "stop",
                ((0, len(s["token_ids"])),),
            ),
            s["reward"],
            s["advantage"],
        )
        for s in group["samples"]
    ]
    return SampleGroup(Prompt(group["id"], "", np.array(group["token_ids"], np.int32)), samples)
