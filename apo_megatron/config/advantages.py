"""Settings of the advantage estimators that have any, and what the rules must know of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import NonNegativeFloat, PositiveInt, Section

AdvantageEstimatorName = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_plus_plus_baseline",
    "opo",
    "psr",
    "nsr",
    "w_reinforce",
    "passk",
    "pkpo",
    "gdpo",
    "dvao",
]
# They look at right and wrong, or at the terms of a reward, and so do not see a punishment of its sum.
BY_CORRECTNESS = ("psr", "nsr", "w_reinforce", "passk")
BY_REWARD_TERMS = ("gdpo", "dvao")
NEVER_NEGATIVE = ("psr", "pkpo")


class PassKConfig(Section):
    """advantage_estimator: passk."""

    k: PositiveInt = Field(4, description="k of Pass@k; 1 is GRPO, but for the std.")


class PKPOConfig(Section):
    """advantage_estimator: pkpo."""

    k: Annotated[int, Field(ge=2)] = Field(4, description="k of the expected best of k samples.")


class WReinforceConfig(Section):
    """advantage_estimator: w_reinforce."""

    right_weight: NonNegativeFloat = Field(
        0.1, description="Advantage of a right answer; a wrong one has -1."
    )
