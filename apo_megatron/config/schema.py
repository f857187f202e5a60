"""The configuration of a training run: its sections, and the rules that span them. Frozen: no run changes it.

Defaults < YAML < ``section.field=value`` overrides (see ``loader.py``). Rules are the methods marked
``@rule``. The sections are in the files beside this one, typed and documented once;
docs/configuration.md is generated from them.
"""

from __future__ import annotations

from apo_megatron.config.advantages import (
    BEYOND_GROUP,
    BY_CORRECTNESS,
    BY_REWARD_TERMS,
    NEVER_NEGATIVE,
)
from apo_megatron.config.data import DataConfig, SupervisedDataConfig
from apo_megatron.config.evaluation import EvaluationConfig
from apo_megatron.config.model import ModelConfig
from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.config.parallel import ParallelConfig, token_multiple
from apo_megatron.config.policy_losses import WHOLE_GROUPS
from apo_megatron.config.reward import RewardConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.config.section import Section, rule
from apo_megatron.config.training import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    SupervisedTrainConfig,
    TrainConfig,
)


def _warmup_problem(optimizer: OptimizerConfig, num_updates: int) -> str | None:
    if optimizer.lr_warmup_steps < num_updates:
        return None
    return (
        f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps} must be fewer than the {num_updates} updates "
        "of the run: the learning rate would never reach optimizer.lr"
    )


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
