"""Every setting, typed, documented once. Frozen: a run never changes its configuration.

Defaults < YAML < ``section.field=value`` overrides (see ``loader.py``). Rules that span fields are the
methods marked ``@rule``. The larger sections have files of their own beside this one. docs/configuration.md
is generated from all of them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.advantages import (
    BEYOND_GROUP,
    BY_CORRECTNESS,
    BY_REWARD_TERMS,
    NEVER_NEGATIVE,
)
from apo_megatron.config.data import DataConfig, SupervisedDataConfig
from apo_megatron.config.evaluation import EvaluationConfig
from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.policy_losses import WHOLE_GROUPS
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.section import (
    FrozenList,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    rule,
)


class ModelConfig(Section):
    """The policy: architecture, tokenizer and initial weights."""

    hf_path: str = Field(description="Directory (or hub id) with config.json, safetensors and tokenizer.")
    megatron_path: str | None = Field(
        None, description="Converted checkpoint to take the weights from; hf_path then gives the rest."
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Parameter and compute dtype.")
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="Layer implementation; auto takes TransformerEngine on a GPU that has it."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations recomputed in backward: attention core, or whole layers."
    )
    make_vocab_size_divisible_by: PositiveInt = Field(
        128, description="The vocabulary is padded to a multiple of this times tensor_parallel_size."
    )
    max_logits_mib: NonNegativeInt = Field(
        1024,
        description="Logits of a micro-batch that would take more than this on a rank are never made: the LM "
        "head and the loss become one operation, which is slower; 0 = always.",
    )


class ParallelConfig(Section):
    """How the ranks of one torchrun job are divided. Data parallel size is what remains."""

    tensor_parallel_size: PositiveInt = Field(1, description="TP: ranks that share every layer.")
    pipeline_parallel_size: PositiveInt = Field(1, description="PP: stages that share the layers.")
    virtual_pipeline_parallel_size: PositiveInt | None = Field(
        None, description="VPP: model chunks per stage (interleaved schedule); needs PP > 1."
    )
    context_parallel_size: PositiveInt = Field(1, description="CP: ranks that share one sequence.")
    expert_parallel_size: PositiveInt = Field(1, description="EP: ranks that divide the experts.")
    expert_tensor_parallel_size: PositiveInt = Field(1, description="ETP: ranks that share every expert.")
    sequence_parallel: bool = Field(False, description="SP: shard norms and dropout over TP; needs TP > 1.")
    distributed_optimizer: bool = Field(True, description="Shard the optimizer state over data parallel.")
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients over data parallel while the last backward goes on."
    )
    overlap_param_gather: bool = Field(
        False,
        description="Gather updated weights while the next forward goes on; needs distributed_optimizer and "
        "overlap_grad_reduce.",
    )
    timeout_minutes: PositiveFloat = Field(30.0, description="Time-out of a collective.")
    stall_minutes: NonNegativeFloat | None = Field(
        None,
        description="A training run in which no rank makes progress for so long says which rank is behind, "
        "and ends; null = two thirds of timeout_minutes, 0: it waits for the time-out.",
    )

    @property
    def patience_minutes(self) -> float:
        """``stall_minutes``, or what its default stands for."""
        return 2 / 3 * self.timeout_minutes if self.stall_minutes is None else self.stall_minutes

    @rule
    def stalls_end_before_timeout(self) -> str | None:
        """`stall_minutes` is less than `timeout_minutes`: a time-out says nothing about the other ranks."""
        if self.stall_minutes is not None and self.stall_minutes >= self.timeout_minutes:
            return (
                f"stall_minutes={self.stall_minutes:g} must be less than timeout_minutes="
                f"{self.timeout_minutes:g}, or the time-out comes first: lower stall_minutes (0 = off) or "
                "raise timeout_minutes"
            )
        return None

    @rule
    def sequence_parallel_needs_tensor_parallel(self) -> str | None:
        """`sequence_parallel` needs `tensor_parallel_size` > 1: it shards over the tensor axis."""
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            return (
                "sequence_parallel=true needs tensor_parallel_size > 1, found 1: "
                "set sequence_parallel=false or raise tensor_parallel_size"
            )
        return None

    @rule
    def param_gather_overlaps_with_both(self) -> str | None:
        """`overlap_param_gather` needs `distributed_optimizer` and `overlap_grad_reduce`."""
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            found = f"{self.distributed_optimizer} and {self.overlap_grad_reduce}".lower()
            return (
                "overlap_param_gather=true needs distributed_optimizer=true and overlap_grad_reduce=true, "
                f"found {found}: set both to true, or overlap_param_gather=false"
            )
        return None

    @rule
    def virtual_pipeline_needs_pipeline(self) -> str | None:
        """`virtual_pipeline_parallel_size` > 1 needs `pipeline_parallel_size` > 1."""
        if self.virtual_pipeline_parallel_size not in (None, 1) and self.pipeline_parallel_size == 1:
            return (
                f"virtual_pipeline_parallel_size={self.virtual_pipeline_parallel_size} needs "
                "pipeline_parallel_size > 1, found 1: set it to null or raise pipeline_parallel_size"
            )
        return None


class RewardTerm(Section):
    """One of several rewards."""

    name: str = Field(description="As reward.name.")
    weight: float = Field(1.0, description="What its reward is multiplied by.")


class VerifierConfig(Section):
    """How rewards run that need processes of their own."""

    num_workers: PositiveInt = Field(
        2, description="Processes per rank that verify (math_verify, format) and can be killed."
    )
    timeout: PositiveFloat = Field(
        5.0, description="Seconds for one answer in a worker; a later one is not judged, and counted."
    )


class RewardConfig(VerifierConfig):
    """What makes an answer right."""

    name: str = Field(
        "countdown",
        description="countdown, exact_match, format, math_verify, multiple_choice, or a function of your own "
        "as package.module:function (docs/rewards.md).",
    )
    rewards: FrozenList[RewardTerm] = Field(
        (), description="Several rewards instead of name, each with name and weight; they are added up."
    )
    answer_field: str = Field("answer", description="Column with the gold answer.")
    format_pattern: str | None = Field(
        None, description="Regular expression that must match a whole answer, for the format reward."
    )
    overlong_buffer: NonNegativeInt = Field(
        0, description="Soft overlong punishment in the last so many tokens of max_new_tokens; 0 = none."
    )
    overlong_penalty: PositiveFloat = Field(1.0, description="What the longest answer loses by it (DAPO).")

    @rule
    def format_needs_a_pattern(self) -> str | None:
        """The format reward needs `format_pattern`, a regular expression."""
        names = [term.name for term in self.rewards] or [self.name]
        if self.format_pattern is None:
            return "format_pattern=null: the format reward needs one" if "format" in names else None
        try:
            re.compile(self.format_pattern)
        except re.error as error:
            return f"format_pattern={self.format_pattern!r} is no regular expression: {error}"
        return None


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


def _warmup_problem(optimizer: OptimizerConfig, num_updates: int) -> str | None:
    if optimizer.lr_warmup_steps < num_updates:
        return None
    return (
        f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps} must be fewer than the {num_updates} updates "
        "of the run: the learning rate would never reach optimizer.lr"
    )


def sequence_multiple(context: int) -> int:
    """What the tokens of a sequence must be a multiple of: context ranks have two equal chunks."""
    return 2 * context if context > 1 else 1


def token_multiple(tensor: int, context: int, sequence_parallel: bool) -> int:
    """What the tokens of a micro-batch must be a multiple of, for its ranks to have equally many."""
    return sequence_multiple(context) * (tensor if sequence_parallel else 1)


def _packing_problem(
    parallel: ParallelConfig, max_tokens: int | None, longest: int, names: str
) -> str | None:
    """``longest``: tokens of the longest sequence, the sum of the fields ``names``."""
    if max_tokens is None:
        return None
    multiple = token_multiple(
        parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.sequence_parallel
    )
    field = f"train.max_tokens_per_micro_batch={max_tokens}"
    if max_tokens % multiple:
        return (
            f"{field} must be a multiple of {multiple}, so that context and sequence parallel ranks have "
            f"equally many tokens: set {max(max_tokens // multiple, 1) * multiple}"
        )
    if max_tokens < longest and parallel.pipeline_parallel_size > 1:
        return (
            f"{field} is less than the longest sequence ({names} = {longest}): under pipeline parallelism "
            f"one such makes all micro-batches as long; set at least {-(-longest // multiple) * multiple}"
        )
    return None


class RLConfig(Section):
    """``python -m apo_megatron.train``."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @rule
    def groups_are_needed_for_advantages(self) -> str | None:
        """`rollout.group_size` must be at least 2: advantages compare the samples of a prompt."""
        if self.rollout.group_size < 2:
            return (
                f"rollout.group_size={self.rollout.group_size}: "
                f"objective.advantage_estimator={self.objective.advantage_estimator} compares the samples "
                "of a prompt and needs at least 2"
            )
        return None

    @rule
    def pass_at_k_fits_into_the_group(self) -> str | None:
        """`objective.passk.k` must be smaller than the smallest group with `advantage_estimator` = passk, and
        `objective.pkpo.k` at most that with pkpo: `rollout.group_size`, with `allocation` = knapsack
        `rollout.knapsack.min_samples`."""
        objective, rollout = self.objective, self.rollout
        field, size = "group_size", rollout.group_size
        if rollout.allocation == "knapsack":
            field, size = "knapsack.min_samples", rollout.knapsack.min_samples
        if objective.advantage_estimator == "passk" and objective.passk.k >= size:
            return (
                f"objective.passk.k={objective.passk.k} is not smaller than rollout.{field}={size}: one "
                f"right answer would make such a group perfect, and nothing would be learned; lower k or "
                f"raise {field}"
            )
        if objective.advantage_estimator == "pkpo" and objective.pkpo.k > size:
            return (
                f"objective.pkpo.k={objective.pkpo.k} is more than rollout.{field}={size}: such a group has "
                f"no k samples; lower k or raise {field}"
            )
        return None

    @rule
    def overlong_punishment_reaches_the_advantages(self) -> str | None:
        """`reward.overlong_buffer` must be 0 with an `objective.advantage_estimator` that does not look at
        the reward as a whole: psr, nsr, w_reinforce, passk, gdpo, dvao."""
        name, seen = self.objective.advantage_estimator, "right and wrong only"
        if not self.reward.overlong_buffer or name not in BY_CORRECTNESS + BY_REWARD_TERMS:
            return None
        if name in BY_REWARD_TERMS:
            seen = "the single terms of the reward"
        return (
            f"reward.overlong_buffer={self.reward.overlong_buffer} has no effect with "
            f"objective.advantage_estimator={name}, which looks at {seen}: set it to 0, or choose another "
            "estimator"
        )

    @rule
    def estimators_of_several_rewards_have_them(self) -> str | None:
        """`objective.advantage_estimator` = gdpo or dvao needs at least two `reward.rewards`."""
        name, num_terms = self.objective.advantage_estimator, len(self.reward.rewards)
        if name in BY_REWARD_TERMS and num_terms < 2:
            return (
                f"objective.advantage_estimator={name} normalises several rewards one by one, "
                f"reward.rewards has {num_terms}: list at least two, or choose grpo"
            )
        return None

    @rule
    def bundles_are_whole(self) -> str | None:
        """With `objective.advantage_estimator` = riskpo, `data.prompts_per_step` must be a multiple of
        `objective.riskpo.bundle_size`, and `rollout.allocation` uniform."""
        size, num_prompts = self.objective.riskpo.bundle_size, self.data.prompts_per_step
        if self.objective.advantage_estimator != "riskpo":
            return None
        if num_prompts % size:
            return (
                f"data.prompts_per_step={num_prompts} is no multiple of objective.riskpo.bundle_size={size}: "
                f"set {num_prompts // size * size or size}, or another bundle_size"
            )
        if self.rollout.allocation != "uniform":
            return (
                f"rollout.allocation={self.rollout.allocation} with objective.advantage_estimator=riskpo, "
                "which adds up the rewards of prompts sample by sample: set uniform"
            )
        return None

    @rule
    def groups_are_dropped_for_what_they_are(self) -> str | None:
        """`rollout.drop_zero_spread` must be false with `objective.advantage_estimator` = riskpo or dcpo:
        what a group teaches depends on others of its step, or of earlier ones."""
        name = self.objective.advantage_estimator
        if self.rollout.drop_zero_spread and name in BEYOND_GROUP:
            return (
                f"rollout.drop_zero_spread=true with objective.advantage_estimator={name}, which learns from "
                "groups of equal rewards, too: set it to false"
            )
        return None

    @rule
    def apo_has_wrong_answers(self) -> str | None:
        """`objective.loss_mode` = apo_ratio needs an `advantage_estimator` that is negative somewhere: not
        psr, not pkpo."""
        name = self.objective.advantage_estimator
        if self.objective.loss_mode == "apo_ratio" and name in NEVER_NEGATIVE:
            return (
                f"objective.advantage_estimator={name} is never negative, so loss_mode=apo_ratio, which "
                "changes the loss where A < 0, would be vanilla: set loss_mode=vanilla, or another estimator"
            )
        return None

    @rule
    def overlong_buffer_is_a_part_of_the_response(self) -> str | None:
        """`reward.overlong_buffer` must be smaller than `rollout.max_new_tokens`, whose end it is."""
        if self.reward.overlong_buffer >= self.rollout.max_new_tokens:
            return (
                f"reward.overlong_buffer={self.reward.overlong_buffer} is not smaller than "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}: every answer would be punished for "
                "its length; lower it, or set 0"
            )
        return None

    @rule
    def best_metric_is_measured(self) -> str | None:
        """`checkpoint.best_metric` of the form eval/... must be one that `evaluation` measures between the
        ends of the run: eval/pass_at_K, K of `ks` and at most `interval_num_samples`, `interval` > 0."""
        metric, cfg = self.checkpoint.best_metric, self.evaluation
        if metric is None or not metric.startswith("eval/"):
            return None
        measured = [f"eval/pass_at_{k}" for k in cfg.ks if cfg.interval and k <= cfg.interval_num_samples]
        if metric in measured:
            return None
        return (
            f"checkpoint.best_metric={metric} is not measured during the run: evaluation.interval="
            f"{cfg.interval}, ks={list(cfg.ks)} and interval_num_samples={cfg.interval_num_samples} give "
            f"{', '.join(measured) or 'nothing'}"
        )

    @rule
    def packed_sequences_fit(self) -> str | None:
        """`train.max_tokens_per_micro_batch` must be a multiple of 2 x CP (x TP with SP), and hold
        the longest prompt and response where `parallel.pipeline_parallel_size` > 1."""
        return _packing_problem(
            self.parallel,
            self.train.max_tokens_per_micro_batch,
            self.data.max_prompt_length + self.rollout.max_new_tokens,
            "data.max_prompt_length + rollout.max_new_tokens",
        )

    @rule
    def mini_batches_are_not_empty(self) -> str | None:
        """`train.num_mini_batches` must not exceed `data.prompts_per_step` x `rollout.group_size`; with
        `objective.loss_mode` = dmpo, which compares all samples of a prompt, not `data.prompts_per_step`."""
        num_prompts, name = self.data.prompts_per_step, self.objective.loss_mode
        if name in WHOLE_GROUPS and self.train.num_mini_batches > num_prompts:
            return (
                f"train.num_mini_batches={self.train.num_mini_batches} is more than data.prompts_per_step="
                f"{num_prompts}, and objective.loss_mode={name} keeps the samples of a prompt in one "
                "mini-batch: lower it"
            )
        num_samples = self.data.prompts_per_step * self.rollout.group_size
        if self.train.num_mini_batches > num_samples:
            return (
                f"train.num_mini_batches={self.train.num_mini_batches} is more than the {num_samples} "
                f"samples of a step (data.prompts_per_step={self.data.prompts_per_step} x "
                f"rollout.group_size={self.rollout.group_size}): lower it"
            )
        return None

    @rule
    def warmup_ends_before_training(self) -> str | None:
        """`optimizer.lr_warmup_steps` must be fewer than `train.num_steps` x `train.num_mini_batches`."""
        return _warmup_problem(self.optimizer, self.train.num_steps * self.train.num_mini_batches)


class SFTConfig(Section):
    """``python -m apo_megatron.sft``."""

    model: ModelConfig
    data: SupervisedDataConfig
    train: SupervisedTrainConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @rule
    def packed_sequences_fit(self) -> str | None:
        """`train.max_tokens_per_micro_batch` must be a multiple of 2 x CP (x TP with SP), and hold
        `data.max_length` where `parallel.pipeline_parallel_size` > 1."""
        return _packing_problem(
            self.parallel, self.train.max_tokens_per_micro_batch, self.data.max_length, "data.max_length"
        )

    @rule
    def no_best_checkpoints(self) -> str | None:
        """`checkpoint.keep_best` must be 0: nothing is evaluated."""
        if self.checkpoint.keep_best:
            return (
                f"checkpoint.keep_best={self.checkpoint.keep_best}: the cold start evaluates nothing, set 0"
            )
        return None

    @rule
    def warmup_ends_before_training(self) -> str | None:
        """`optimizer.lr_warmup_steps` must be fewer than `train.num_steps`."""
        return _warmup_problem(self.optimizer, self.train.num_steps)
