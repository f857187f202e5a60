"""Settings of the rollouts: how samples are drawn, and the SGLang servers that draw them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.sampling import (
    D3SConfig,
    KnapsackConfig,
    SampleAllocationName,
    SampleFilterName,
)
from apo_megatron.config.section import (
    FrozenList,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    rule,
)


class SGLangConfig(Section):
    """SGLang servers: who starts them, how weights reach them, when one counts as lost."""

    urls: FrozenList[str] = Field(
        (), description="Servers that run already, http://host:port; empty = the run starts num_servers."
    )
    servers_file: str | None = Field(
        None,
        description="JSON list of servers that a supervisor (the Ray launcher) keeps up to date; or a folder "
        "of such lists, one a machine.",
    )
    router_url: str | None = Field(
        None, description="Router that /generate goes through; weights and control go to the servers."
    )
    num_servers: PositiveInt = Field(1, description="Servers to start on the machine of rank 0.")
    python: str = Field("python", description="Interpreter of the environment that has sglang.")
    tensor_parallel_size: PositiveInt = Field(1, description="TP of each server, also of those in urls.")
    server_args: FrozenList[str] = Field((), description="More arguments of sglang.launch_server.")
    host: str = Field("127.0.0.1", description="Address that started servers bind to.")
    api_key_variable: str = Field(
        "SGLANG_API_KEY", description="Environment variable with the servers' API key; unset = none."
    )
    colocated: bool = Field(
        False, description="Servers share the trainer's GPUs: they free memory while the trainer works."
    )
    weight_transport: Literal["auto", "tensors", "broadcast", "disk"] = Field(
        "auto",
        description="How weights travel: shared memory (same machine), a broadcast group, or files; auto = "
        "tensors for servers that the run starts or that are colocated, else broadcast.",
    )
    weight_folder: str | None = Field(
        None, description="Shared folder of the disk transport, for any number of runs; null = in run_dir."
    )
    max_concurrent_requests: PositiveInt = Field(
        256, description="Requests that one rank has under way at one server."
    )
    max_attempts: PositiveInt = Field(6, description="How often a request is sent before the run gives up.")
    request_timeout: PositiveFloat = Field(1800.0, description="Seconds for one answer.")
    update_timeout: PositiveFloat = Field(300.0, description="Seconds for one step of a weight update.")
    health_interval: PositiveFloat = Field(10.0, description="Seconds between two looks at a server.")
    health_timeout: PositiveFloat = Field(
        30.0, description="Seconds without a sign of life after which a server counts as lost."
    )
    startup_timeout: PositiveFloat = Field(900.0, description="Seconds a server may take to start.")
    unavailable_timeout: PositiveFloat = Field(
        900.0, description="Seconds that the run waits while no server at all is usable."
    )
    max_restarts: NonNegativeInt = Field(
        10, description="Restarts of a server, each within 10 minutes of the last, before it is given up."
    )

    @rule
    def servers_come_from_one_place(self) -> str | None:
        """`urls` and `servers_file` exclude each other."""
        if self.urls and self.servers_file is not None:
            return "urls and servers_file are both set: the servers come from one of them, leave one out"
        return None

    @rule
    def a_router_is_for_servers_that_run(self) -> str | None:
        """`router_url` needs `urls` or `servers_file`: the servers behind it."""
        if self.router_url is not None and not self.urls and self.servers_file is None:
            return f"router_url={self.router_url} without the servers behind it: list them in urls"
        return None

    @rule
    def urls_are_http(self) -> str | None:
        """Each of `urls`, and `router_url`, must start with http:// or https://."""
        for url in (*self.urls, *([] if self.router_url is None else [self.router_url])):
            if not url.startswith(("http://", "https://")):
                return f"{url!r} is no URL: write http://host:port"
        return None

    @rule
    def urls_are_different(self) -> str | None:
        """`urls` must name each server once."""
        if len(set(self.urls)) != len(self.urls):
            return f"urls={list(self.urls)} names a server twice: leave it out once"
        return None


class RolloutConfig(Section):
    """How samples are drawn during training. Its temperature is the T of every distribution."""

    engine: Literal["embedded", "sglang"] = Field(
        "embedded", description="embedded: transformers in this process; sglang: SGLang servers."
    )
    group_size: PositiveInt = Field(16, description="G: samples per prompt.")
    temperature: PositiveFloat = Field(1.0, description="T of sampling, of pi_theta, pi_old and pi_ref.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling mass.")
    top_k: NonNegativeInt = Field(0, description="Sample among the k likeliest tokens; 0 = all.")
    max_new_tokens: PositiveInt = Field(1024, description="Longest response in tokens.")
    stop_token_ids: FrozenList[NonNegativeInt] = Field(
        (), description="Stop tokens beside the tokenizer's EOS."
    )
    max_batch_size: PositiveInt = Field(
        1024,
        description="Sequences that one rank decodes at once (embedded engine).",
    )
    drop_zero_spread: bool = Field(
        False,
        description="Dynamic sampling: replace groups that teach nothing by new prompts; for most advantage "
        "estimators those that are all right or all wrong.",
    )
    oversampling: Annotated[float, Field(ge=1)] = Field(
        1.0, description="Prompts drawn per prompt wanted; once enough groups are complete the rest stops."
    )
    max_refills: NonNegativeInt = Field(
        3, description="Further rounds of prompts in one step while groups are missing (dynamic sampling)."
    )
    partial_rollouts: bool = Field(
        False, description="What is stopped goes on in the next step, with the tokens that it has."
    )
    asynchronous: bool = Field(
        False, description="Draw the samples of the next step while this one trains (sglang)."
    )
    max_staleness: NonNegativeInt = Field(
        0, description="Oldest policy version that a trained token may have, in versions behind."
    )
    mask_truncated: bool = Field(
        False, description="Do not train on answers that were cut at max_new_tokens (overlong filtering)."
    )
    sample_filter: SampleFilterName = Field(
        "none", description="Which samples of a step are trained on, by their advantages: docs/methods.md."
    )
    d3s: D3SConfig = D3SConfig()
    allocation: SampleAllocationName = Field(
        "uniform", description="How many samples each prompt gets, group_size on average: docs/methods.md."
    )
    knapsack: KnapsackConfig = KnapsackConfig()
    canary_prompts: NonNegativeInt = Field(
        4, description="Prompts whose log-probs are compared with the actor's after each update; 0 = none."
    )
    max_canary_gap: PositiveFloat = Field(
        0.1, description="Largest mean |log-prob difference| (nats) there; above it the run stops."
    )
    bucket_mib: PositiveInt = Field(512, description="Weights travel in buckets of at most so many MiB.")
    sglang: SGLangConfig = SGLangConfig()

    @rule
    def oversampling_stops_something(self) -> str | None:
        """`oversampling` > 1 needs `engine` = sglang, or `drop_zero_spread`: the embedded one draws all."""
        if self.oversampling > 1 and self.engine == "embedded" and not self.drop_zero_spread:
            return (
                f"oversampling={self.oversampling:g} with engine=embedded, which is never stopped half-way: "
                "set sglang, or 1 (or drop_zero_spread=true, which uses what is drawn)"
            )
        return None

    @rule
    def knapsack_can_spend_its_budget(self) -> str | None:
        """With `allocation` = knapsack, `group_size` must lie between `knapsack.min_samples` and
        `knapsack.max_samples`."""
        own = self.knapsack
        if self.allocation == "knapsack" and not own.min_samples <= self.group_size <= own.max_samples:
            return (
                f"group_size={self.group_size}, the average, does not lie between knapsack.min_samples="
                f"{own.min_samples} and knapsack.max_samples={own.max_samples}: change one of them"
            )
        return None

    @rule
    def asynchronous_needs_servers(self) -> str | None:
        """`asynchronous` needs `engine` = sglang, and `max_staleness` of at least 1."""
        if self.asynchronous and self.engine == "embedded":
            return "asynchronous=true with engine=embedded, which shares the trainer's process: set sglang"
        if self.asynchronous and self.max_staleness < 1:
            return "asynchronous=true with max_staleness=0: samples are one version behind, set at least 1"
        return None

    @rule
    def partial_rollouts_are_stale(self) -> str | None:
        """`partial_rollouts` needs `engine` = sglang, `max_staleness` of at least 1, and `oversampling` > 1
        or `asynchronous`: otherwise nothing is ever stopped."""
        if self.partial_rollouts and self.max_staleness < 1:
            return "partial_rollouts=true with max_staleness=0: what goes on has older tokens, set at least 1"
        if self.partial_rollouts and self.oversampling == 1 and not self.asynchronous:
            return "partial_rollouts=true stops nothing: set oversampling above 1, or asynchronous=true"
        if self.partial_rollouts and self.engine == "embedded":
            return "partial_rollouts=true with engine=embedded, which is never stopped half-way: set sglang"
        return None

    @rule
    def colocated_servers_wait(self) -> str | None:
        """`sglang.colocated` and `asynchronous` exclude each other: the GPUs do one thing at a time."""
        if self.sglang.colocated and self.asynchronous:
            return "sglang.colocated=true with asynchronous=true: the servers then need their own GPUs"
        return None
