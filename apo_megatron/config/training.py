"""The sections of a training run beside its model and data: optimizer, loop, checkpoints, logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    rule,
)


class OptimizerConfig(Section):
    """AdamW with Megatron's parameter scheduler; no weight decay on norms and biases."""

    lr: PositiveFloat = Field(1e-6, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(0.0, description="Where the decay ends.")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field("constant", description="After warm-up.")
    lr_warmup_steps: NonNegativeInt = Field(0, description="Updates of linear warm-up.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Adam beta 1.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Adam beta 2.")
    adam_eps: PositiveFloat = Field(1e-8, description="Adam epsilon.")
    clip_grad: NonNegativeFloat = Field(1.0, description="Global gradient norm; 0 = no clipping.")
    offload: bool = Field(
        False, description="Keep the optimizer's state in host memory while gradients are computed."
    )

    @rule
    def min_lr_is_not_above_lr(self) -> str | None:
        """`min_lr` must not be above `lr`."""
        if self.min_lr > self.lr:
            return f"min_lr={self.min_lr} is above lr={self.lr}: lower min_lr"
        return None


class TrainConfig(Section):
    """The loop."""

    run_dir: str = Field(description="Directory of this run: config, metrics, checkpoints, pictures.")
    num_steps: PositiveInt = Field(description="Rollout-and-train steps.")
    num_mini_batches: PositiveInt = Field(1, description="Optimizer updates per step.")
    micro_batch_size: PositiveInt = Field(
        1, description="Sequences of one forward/backward on one rank, padded to the longest of the pass."
    )
    max_tokens_per_micro_batch: PositiveInt | None = Field(
        None,
        description="Pack sequences up to so many tokens into one forward/backward, without padding, instead "
        "of micro_batch_size; its context_parallel_size ranks share them.",
    )
    seed: NonNegativeInt = Field(0, description="Seed of data order, sampling and initialisation.")
    max_skipped_updates: PositiveInt = Field(
        3, description="Non-finite updates in a row that stop the run (its state is saved)."
    )
    save_rollouts: NonNegativeInt = Field(
        1, description="Write the samples of every so many steps into run_dir/rollouts; 0 = never."
    )
    keep_rollouts: NonNegativeInt = Field(
        0, description="Keep the samples of so many of the newest steps; 0 = all."
    )


class SupervisedTrainConfig(Section):
    """The supervised loop."""

    run_dir: str = Field(description="Directory of this run.")
    num_steps: PositiveInt = Field(description="Optimizer updates.")
    batch_size: PositiveInt = Field(256, description="Examples of one update, over all ranks.")
    micro_batch_size: PositiveInt = Field(
        1, description="Sequences of one forward/backward on one rank, padded to the longest of the pass."
    )
    max_tokens_per_micro_batch: PositiveInt | None = Field(
        None,
        description="Pack sequences up to so many tokens into one forward/backward, without padding, instead "
        "of micro_batch_size; its context_parallel_size ranks share them.",
    )
    seed: NonNegativeInt = Field(0, description="Seed of the data order.")
    max_skipped_updates: PositiveInt = Field(3, description="Non-finite updates in a row that stop the run.")


class CheckpointConfig(Section):
    """Training checkpoints under run_dir/checkpoints and the final Hugging Face export."""

    interval: NonNegativeInt = Field(0, description="Save every so many steps; 0 = never.")
    save_final: bool = Field(False, description="Save when the run ends, also where interval does not.")
    async_save: bool = Field(True, description="Write files while training goes on; needs a copy in memory.")
    keep_last: NonNegativeInt = Field(0, description="Keep so many of the newest checkpoints; 0 = all.")
    keep_best: NonNegativeInt = Field(0, description="Keep so many with the highest best_metric, too.")
    best_metric: str | None = Field(None, description="Metric of keep_best, such as eval/pass_at_8.")
    resume: Literal["auto", "never"] = Field(
        "never", description="auto: go on from the latest checkpoint (--resume auto)."
    )
    export_hf: bool = Field(True, description="Write run_dir/hf (safetensors, config, tokenizer) at the end.")
    export_hf_interval: NonNegativeInt = Field(
        0, description="Write run_dir/hf_step_XXXXXX every so many steps, during the next rollout; 0 = never."
    )

    @rule
    def best_checkpoints_need_a_metric(self) -> str | None:
        """`keep_best` > 0 needs `best_metric`, and `keep_last` > 0: without it all are kept anyway."""
        if self.keep_best and self.best_metric is None:
            return f"keep_best={self.keep_best} without best_metric: name one, such as eval/pass_at_8"
        if self.keep_best and not self.keep_last:
            return (
                f"keep_best={self.keep_best} with keep_last=0, which keeps every checkpoint: set keep_last "
                "to at least 1, or keep_best=0"
            )
        return None


class LoggingConfig(Section):
    """Where metrics go beside the terminal and metrics.jsonl, and what is made of them."""

    tensorboard: bool = Field(True, description="Write TensorBoard events into run_dir/tensorboard.")
    wandb_project: str | None = Field(None, description="Weights & Biases project; null = off.")
    report: bool = Field(
        True, description="Draw training_curves.png and write report.html when the run ends (seconds)."
    )
