"""Supervised cold start: the same actor, batches and checkpoints, with -log pi(y) as the loss.

torchrun --nproc-per-node 2 -m apo_megatron.sft --config examples/countdown/sft.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apo_megatron.actor.actor import MegatronActor
from apo_megatron.actor.checkpointer import Checkpointer
from apo_megatron.actor.micro_batches import MicroBatchSize
from apo_megatron.config import ObjectiveConfig, SFTConfig
from apo_megatron.data.collate import TrainingSequence, make_batch
from apo_megatron.objectives.objective import supervised_objective
from apo_megatron.parallel.state import init_parallel
from apo_megatron.run import Run
from apo_megatron.telemetry.command import parse_command_line, run_command
from apo_megatron.training_data import load_supervised_data


def sft(cfg: SFTConfig) -> None:
    """Run all steps and export run_dir/hf. Raises the errors of ``errors.py`` for what a user can mend."""
    parallel = init_parallel(cfg.parallel, cfg.train.seed)
    demonstrations = load_supervised_data(cfg)
    objective, aggregation = supervised_objective(), ObjectiveConfig()  # token-mean
    with Run(cfg, parallel, title="cold start") as run:
        actor = MegatronActor(
            cfg.model,
            cfg.optimizer,
            parallel,
            MicroBatchSize(cfg.train.micro_batch_size, cfg.train.max_tokens_per_micro_batch),
            num_updates=cfg.train.num_steps,
        )
        checkpointer = Checkpointer(run.checkpoint_folder, cfg, actor, {"data": demonstrations})
        for step in range(run.resume(checkpointer), cfg.train.num_steps):
            sequences = [
                TrainingSequence(tokens, prompt_length)
                for tokens, prompt_length in demonstrations.next_batch()
            ]
            seed = (cfg.train.seed, step)
            batch = make_batch(sequences, aggregation, parallel, num_mini_batches=1, seed=seed)
            with run.phase("cold start", batch.num_sequences) as advance:
                metrics = actor.update(batch.sequences, objective, advance)
            run.finish_step(step, metrics, actor, checkpointer)
        run.finish(checkpointer, actor)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        sft(parse_command_line(words, SFTConfig, "python -m apo_megatron.sft"))

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
