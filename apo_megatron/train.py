"""RL with verifiable rewards: read ``train`` first, it is the whole loop.

    torchrun --nproc-per-node 2 -m apo_megatron.train --config examples/countdown/apo.yaml

Every rank runs the same program. One step: push the weights into the engine, sample a group of answers for
each prompt, score them, turn rewards into advantages, look up the reference on the wrong answers, take a few
optimizer updates.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer, Stateful
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.actor.snapshot import WeightSnapshot
from apo_megatron.config import RLConfig
from apo_megatron.data.collate import make_batch, trained_sequences
from apo_megatron.objectives.moving_coefficients import MovingObjective
from apo_megatron.objectives.objective import Objective, build_objective
from apo_megatron.parallel.state import init_parallel
from apo_megatron.rollout.advantage_state import AdvantageState
from apo_megatron.rollout.build import build_engine
from apo_megatron.rollout.filtering import filter_samples
from apo_megatron.rollout.groups import assign_advantages, group_metrics
from apo_megatron.rollout.sampler import GroupSampler
from apo_megatron.run import Evaluator, Run, mean_metrics
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.training_data import load_training_data
from apo_megatron.weight_sync import WeightSync
from apo_megatron.weights.digest import weights_digest


def train(cfg: RLConfig) -> None:
    """Run all steps. Raises the errors of ``errors.py`` for what a user can mend."""
    parallel = init_parallel(cfg.parallel, cfg.train.seed)
    data = load_training_data(cfg)
    with Run(cfg, parallel, title="training") as run:
        engine = run.closing(build_engine(cfg.rollout, cfg.model, parallel, run.folder, run.note))
        actor = MegatronActor(
            cfg.model,
            cfg.optimizer,
            parallel,
            MicroBatchSize(cfg.train.micro_batch_size, cfg.train.max_tokens_per_micro_batch),
            num_updates=cfg.train.num_steps * cfg.train.num_mini_batches,
            temperature=cfg.rollout.temperature,
            weight_bucket_bytes=cfg.rollout.bucket_mib * 2**20,
        )
        objective = build_objective(cfg.objective)
        reference, digest = _reference(actor, objective)  # pi_ref, before anything is resumed
        sampler = GroupSampler(engine, data.prompts, data.reward, cfg, parallel)
        parts: dict[str, Stateful] = {"data": data.prompts, "rollout": sampler}
        moving, advantage_state = MovingObjective(objective), AdvantageState(cfg.objective)
        parts |= {part.name: part for part in (moving, advantage_state) if part.is_stateful}
        checkpointer = Checkpointer(run.checkpoint_folder, cfg, actor, parts, digest)
        version = start = run.resume(checkpointer)  # policy version: one more with each step that trains
        sync = WeightSync(cfg.rollout, actor, engine, sampler, data.prompts)
        evaluator = Evaluator(cfg, parallel, run, engine, sync, data)
        if cfg.evaluation.at_start and start == 0:
            evaluator.run("start", version)

        num_samples = cfg.data.prompts_per_step * cfg.rollout.group_size // parallel.world
        for step in range(start, cfg.train.num_steps):
            objective = moving.at(step)
            with run.phase("weight sync"):
                metrics = sync.push(version)
            with run.phase("rollout", num_samples) as advance:
                samples = sampler.next_groups(step, actor.weight_source(), advance)
                sync.rest()
            if samples.note is not None:
                run.note(samples.note)
            groups = samples.groups
            assign_advantages(groups, cfg, advantage_state)
            metrics |= samples.metrics | group_metrics(groups, cfg) | filter_samples(groups, cfg, step)
            sequences = trained_sequences(groups)
            metrics["skipped_step"] = float(not sequences)
            batch = None
            if sequences:  # else there is nothing to learn from: every group is all right or all wrong
                seed = (cfg.train.seed, step)
                batch = make_batch(sequences, cfg.objective, parallel, cfg.train.num_mini_batches, seed)
                if cfg.objective.old_log_probs == "recompute":
                    with run.phase("old log-probs", batch.num_sequences) as advance:
                        batch.sequences = actor.attach_old_log_probs(batch.sequences, advance)
                        metrics |= actor.measure_mismatch(batch.sequences, objective)
                if reference is not None:
                    total = batch.num_in_scope(objective.reference_scope)
                    with run.phase("reference", total) as advance, actor.weights_from(reference):
                        batch.sequences, found = actor.attach_reference(batch.sequences, objective, advance)
                    metrics |= found
                with run.phase("update", batch.num_sequences) as advance:
                    updates = [
                        actor.update(part, objective, advance, batch.pulled.append)
                        for part in batch.mini_batches()
                    ]
                    actor.update_average()
                metrics |= mean_metrics(updates)
                version += 1
            metrics |= moving.finish_step(step, metrics)
            run.save_samples(step, samples, batch)
            if run.is_due(cfg.evaluation.interval, step):
                metrics |= evaluator.metrics(version)
            run.finish_step(step, metrics, actor, checkpointer)

        run.finish(checkpointer, actor)  # first: the evaluation may take hours, and a time limit ends it
        evaluator.run("final", version)


def _reference(actor: MegatronActor, objective: Objective) -> tuple[WeightSnapshot | None, str | None]:
    """What ``objective`` compares with, and its digest where a run that goes on reads it again."""
    if objective.reference_scope == "none":
        return None, None
    if objective.reference_decay is not None:  # it comes out of the checkpoint
        return actor.start_average(objective.reference_decay), None
    return actor.snapshot(), weights_digest(actor.weight_source(), actor.parallel)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        train(parse_command_line(words, RLConfig, "python -m apo_megatron.train"))

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
