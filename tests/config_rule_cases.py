"""Every rule of the configuration, broken: for tests/test_config.py."""

from __future__ import annotations

from apo_megatron.config import EvalConfig, RLConfig, SFTConfig
from apo_megatron.config.section import Section

# (config, rule, overrides that break it and nothing else, fields that the message must name)
BROKEN_RULES: list[tuple[type[Section], str, list[str], list[str]]] = [
    (
        RLConfig,
        "sequence_parallel_needs_tensor_parallel",
        ["parallel.sequence_parallel=true"],
        ["parallel:", "sequence_parallel=true", "tensor_parallel_size"],
    ),
    (RLConfig, "prompts_come_from_one_place", ["data.train_path=null"], ["data:", "neither is given"]),
    (
        RLConfig,
        "prompts_come_from_one_place",
        ["data.sources=[{path: a}]"],
        ["data:", "train_path and sources", "both are given"],
    ),
    (
        RLConfig,
        "sources_have_formats_of_their_own",
        ["data.train_path=null", "data.sources=[{path: a}]", "data.fields={answer: b}"],
        ["data:", "fields beside sources"],
    ),
    (
        RLConfig,
        "source_names_are_different",
        ["data.train_path=null", "data.sources=[{path: a/x.jsonl}, {path: b, name: x}]"],
        ["data:", "['x', 'x']"],
    ),
    (
        RLConfig,
        "virtual_pipeline_needs_pipeline",
        ["parallel.virtual_pipeline_parallel_size=2"],
        ["parallel:", "virtual_pipeline_parallel_size=2", "pipeline_parallel_size > 1"],
    ),
    (
        RLConfig,
        "context_parallel_is_not_available",
        ["parallel.context_parallel_size=2"],
        ["parallel:", "context_parallel_size=2"],
    ),
    (
        RLConfig,
        "best_checkpoints_need_a_metric",
        ["checkpoint.keep_best=2", "checkpoint.keep_last=1"],
        ["checkpoint:", "keep_best=2", "best_metric"],
    ),
    (
        RLConfig,
        "best_checkpoints_need_a_metric",
        ["checkpoint.keep_best=2", "checkpoint.best_metric=reward"],
        ["checkpoint:", "keep_best=2", "keep_last=0"],
    ),
    (
        RLConfig,
        "best_metric_is_measured",
        [
            "checkpoint.best_metric=eval/pass_at_8",
            "evaluation.data_path=x",
            "evaluation.interval=5",
            "evaluation.ks=[1, 4]",
        ],
        ["checkpoint.best_metric=eval/pass_at_8", "ks=[1, 4]", "eval/pass_at_1, eval/pass_at_4"],
    ),
    (
        RLConfig,
        "best_metric_is_measured",
        ["checkpoint.best_metric=eval/pass_at_8"],
        ["checkpoint.best_metric=eval/pass_at_8", "evaluation.interval=0", "give nothing"],
    ),
    (
        SFTConfig,
        "no_best_checkpoints",
        ["checkpoint.keep_best=1", "checkpoint.keep_last=1", "checkpoint.best_metric=loss"],
        ["checkpoint.keep_best=1", "evaluates nothing"],
    ),
    (
        RLConfig,
        "wrong_tokens_must_not_start_clipped",
        ["objective.apo_pull_coeff=0.3"],
        ["objective:", "apo_push_coeff - apo_pull_coeff = 0.75", "(0.8, 1.28)", "clip_low", "clip_high"],
    ),
    (
        RLConfig,
        "dual_clip_is_above_the_clip_range",
        ["objective.dual_clip=1.28"],
        ["objective:", "dual_clip=1.28", "clip_high"],
    ),
    (
        RLConfig,
        "correction_compares_two_passes",
        ["objective.mismatch_correction=tis", "objective.old_log_probs=rollout"],
        ["objective:", "mismatch_correction=tis", "old_log_probs=rollout"],
    ),
    (
        RLConfig,
        "one_kl_loss_at_most",
        ["objective.use_kl_loss=true", "objective.use_kl_loss_on_wrong=true"],
        ["objective:", "use_kl_loss and use_kl_loss_on_wrong"],
    ),
    (
        RLConfig,
        "constant_goes_with_its_aggregation",
        ["objective.loss_aggregation=seq-mean-token-sum-norm"],
        ["objective:", "loss_aggregation=seq-mean-token-sum-norm", "loss_aggregation_constant"],
    ),
    (
        RLConfig,
        "constant_goes_with_its_aggregation",
        ["objective.loss_aggregation_constant=100"],
        ["objective:", "loss_aggregation=token-mean", "loss_aggregation_constant", "100"],
    ),
    (
        RLConfig,
        "servers_come_from_one_place",
        ["rollout.sglang.urls=[http://host:1]", "rollout.sglang.servers_file=servers.json"],
        ["rollout.sglang:", "urls and servers_file"],
    ),
    (
        RLConfig,
        "urls_are_http",
        ["rollout.sglang.urls=[http://host:1, host:2]"],
        ["rollout.sglang:", "'host:2'", "http://host:port"],
    ),
    (
        RLConfig,
        "urls_are_http",
        ["rollout.sglang.router_url=host", "rollout.sglang.urls=[http://host:1]"],
        ["rollout.sglang:", "'host'", "http://host:port"],
    ),
    (
        RLConfig,
        "urls_are_different",
        ["rollout.sglang.urls=[http://host:1, http://host:1]"],
        ["rollout.sglang:", "urls=['http://host:1', 'http://host:1']", "twice"],
    ),
    (
        RLConfig,
        "a_router_is_for_servers_that_run",
        ["rollout.sglang.router_url=http://host:1"],
        ["rollout.sglang:", "router_url=http://host:1", "urls"],
    ),
    (
        RLConfig,
        "oversampling_stops_something",
        ["rollout.oversampling=1.5"],
        ["rollout:", "oversampling=1.5", "engine=embedded"],
    ),
    (
        RLConfig,
        "asynchronous_needs_servers",
        ["rollout.asynchronous=true", "rollout.max_staleness=1"],
        ["rollout:", "asynchronous=true", "engine=embedded"],
    ),
    (
        RLConfig,
        "asynchronous_needs_servers",
        ["rollout.engine=sglang", "rollout.asynchronous=true"],
        ["rollout:", "asynchronous=true", "max_staleness=0"],
    ),
    (
        RLConfig,
        "partial_rollouts_are_stale",
        ["rollout.engine=sglang", "rollout.partial_rollouts=true", "rollout.oversampling=1.5"],
        ["rollout:", "partial_rollouts=true", "max_staleness=0"],
    ),
    (
        RLConfig,
        "partial_rollouts_are_stale",
        ["rollout.partial_rollouts=true", "rollout.max_staleness=1"],
        ["rollout:", "partial_rollouts=true", "oversampling", "asynchronous=true"],
    ),
    (
        RLConfig,
        "partial_rollouts_are_stale",
        [
            "rollout.partial_rollouts=true",
            "rollout.max_staleness=1",
            "rollout.oversampling=1.5",
            "rollout.drop_zero_spread=true",
        ],
        ["rollout:", "partial_rollouts=true", "engine=embedded"],
    ),
    (
        RLConfig,
        "colocated_servers_wait",
        [
            "rollout.engine=sglang",
            "rollout.sglang.colocated=true",
            "rollout.asynchronous=true",
            "rollout.max_staleness=1",
        ],
        ["rollout:", "sglang.colocated=true", "asynchronous=true"],
    ),
    (
        RLConfig,
        "overlong_buffer_is_a_part_of_the_response",
        ["reward.overlong_buffer=8", "rollout.max_new_tokens=8"],
        ["reward.overlong_buffer=8", "rollout.max_new_tokens=8"],
    ),
    (RLConfig, "format_needs_a_pattern", ["reward.name=format"], ["reward:", "format_pattern=null"]),
    (
        RLConfig,
        "format_needs_a_pattern",
        ["reward.format_pattern='('"],
        ["reward:", "format_pattern='('", "unterminated subpattern"],
    ),
    (
        RLConfig,
        "min_lr_is_not_above_lr",
        ["optimizer.min_lr=1e-3"],
        ["optimizer:", "min_lr=0.001", "lr=1e-06"],
    ),
    (RLConfig, "ks_fit_into_the_samples", ["evaluation.ks=[]"], ["evaluation:", "ks=[]"]),
    (
        RLConfig,
        "ks_fit_into_the_samples",
        ["evaluation.num_samples=128"],
        ["evaluation:", "ks=", "num_samples >= 256", "128"],
    ),
    (
        RLConfig,
        "interval_needs_problems",
        ["evaluation.interval=5"],
        ["evaluation:", "interval=5", "data_path"],
    ),
    (
        RLConfig,
        "groups_are_needed_for_advantages",
        ["rollout.group_size=1"],
        ["rollout.group_size=1", "objective.advantage_estimator=grpo"],
    ),
    (
        RLConfig,
        "mini_batches_are_not_empty",
        ["train.num_mini_batches=9", "data.prompts_per_step=4", "rollout.group_size=2"],
        ["train.num_mini_batches=9", "data.prompts_per_step=4", "rollout.group_size=2", "8 samples"],
    ),
    (
        RLConfig,
        "warmup_ends_before_training",
        ["optimizer.lr_warmup_steps=20", "train.num_mini_batches=2"],
        ["optimizer.lr_warmup_steps=20", "20 updates"],
    ),
    (
        SFTConfig,
        "warmup_ends_before_training",
        ["optimizer.lr_warmup_steps=10"],
        ["optimizer.lr_warmup_steps=10", "10 updates"],
    ),
    (
        EvalConfig,
        "engine_has_weights_of_its_own",
        ["rollout.engine=sglang"],
        ["rollout.engine=sglang", "embedded"],
    ),
    (EvalConfig, "problems_are_named", ["evaluation.data_path=null"], ["evaluation.data_path=null"]),
    (
        EvalConfig,
        "weights_are_those_of_hf_path",
        ["model.megatron_path=converted"],
        ["model.megatron_path=converted", "apo-megatron-to-hf"],
    ),
]
