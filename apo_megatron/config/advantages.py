"""Settings of the advantage estimators that have any, and what the rules must know of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, rule

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
    "riskpo",
    "dcpo",
]
# They look at right and wrong, or at the terms of a reward, and so do not see a punishment of its sum.
BY_CORRECTNESS = ("psr", "nsr", "w_reinforce", "passk")
BY_REWARD_TERMS = ("gdpo", "dvao")
NEVER_NEGATIVE = ("psr", "pkpo")
# The sign of A says on which side of its own group a sample lies.
GROUP_CENTRED = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "passk")
# What a group teaches depends on others of the step, or of earlier ones.
BEYOND_GROUP = ("riskpo", "dcpo")


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


class RiskPOConfig(Section):
    """advantage_estimator: riskpo."""

    bundle_size: PositiveInt = Field(5, description="Prompts of a bundle, neighbours in the step.")
    low_level: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="l: level of the lower quantile.")
    high_level: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="u: level of the upper quantile."
    )
    cvar_weight: NonNegativeFloat = Field(
        1.5, description="w: weight of the part below the lower quantile; that between the two has 1."
    )
    tracking_rate: PositiveFloat = Field(
        0.1, description="How far a tracked quantile moves in a step, in rewards."
    )

    @rule
    def levels_are_in_order(self) -> str | None:
        """`low_level` must be less than `high_level`."""
        if self.low_level >= self.high_level:
            return f"low_level={self.low_level:g} is not less than high_level={self.high_level:g}: lower it"
        return None
