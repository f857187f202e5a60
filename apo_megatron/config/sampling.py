"""Settings of what decides which samples a step draws and which of them it trains on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import PositiveInt, Section

SampleFilterName = Literal["none", "d3s"]
SampleAllocationName = Literal["uniform", "knapsack"]


class D3SConfig(Section):
    """`rollout.sample_filter: d3s`. The share of the samples that is kept grows evenly to 1."""

    first_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="Of the samples of the first step; of the last step all are kept."
    )


class KnapsackConfig(Section):
    """`rollout.allocation: knapsack`. Prompts get rollout.group_size samples on average."""

    min_samples: Annotated[int, Field(ge=2)] = Field(
        2, description="Fewest samples of a prompt: advantages compare them."
    )
    max_samples: PositiveInt = Field(128, description="Most samples of a prompt.")
