"""Settings of the policy losses that have any of their own, each a small section named after its method.

Formulas: docs/methods.md. A loss gets the whole ``ObjectiveConfig``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import NonNegativeFloat, PositiveFloat, Section

PolicyLossName = Literal[
    "apo_ratio",
    "vanilla",
    "cispo",
    "dispo",
    "sapo",
    "gppo",
    "dcpo_clip",
    "dppo_tv",
    "gbpo",
]


class CISPOConfig(Section):
    """`loss_mode: cispo`. Bounds of the detached weight r of A log pi."""

    clip_low: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Smallest weight 1 - clip_low; 1 = no lower bound."
    )
    clip_high: PositiveFloat = Field(4.0, description="Largest weight 1 + clip_high.")


class DISPOConfig(Section):
    """`loss_mode: dispo`. Bounds of the detached weight, for each sign of the advantage."""

    right_clip_low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="A > 0: smallest weight 1 - right_clip_low."
    )
    right_clip_high: PositiveFloat = Field(10.0, description="A > 0: largest weight 1 + right_clip_high.")
    wrong_clip_low: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="A < 0: smallest weight 1 - wrong_clip_low."
    )
    wrong_clip_high: PositiveFloat = Field(100.0, description="A < 0: largest weight 1 + wrong_clip_high.")


class SAPOConfig(Section):
    """`loss_mode: sapo`. How fast the soft gate closes as the ratio leaves 1."""

    right_temperature: PositiveFloat = Field(1.0, description="tau where A > 0; larger closes faster.")
    wrong_temperature: PositiveFloat = Field(1.05, description="tau where A < 0; larger closes faster.")


class GPPOConfig(Section):
    """`loss_mode: gppo`. What a clipped token keeps of its gradient at the bound: 0 = PPO, 1 and 1 = GPPO."""

    right_gradient: NonNegativeFloat = Field(
        1.0, description="b2 of CE-GPPO: share of A > 0, r > 1 + clip_high."
    )
    wrong_gradient: NonNegativeFloat = Field(
        1.0, description="b1 of CE-GPPO: share of A < 0, r < 1 - clip_low (0.25 to 0.75 there)."
    )


class DCPOConfig(Section):
    """`loss_mode: dcpo_clip`. Clip range that widens as pi_old(y) falls."""

    clip_low: PositiveFloat = Field(
        0.2, description="The lower bound is where r (1 - r) pi_old(y) reaches it; at least 1/2."
    )
    clip_high: PositiveFloat = Field(
        0.28, description="The upper bound is where r (r - 1) pi_old(y) reaches it."
    )
    max_ratio: Annotated[float, Field(gt=1)] = Field(10.0, description="Largest upper bound of the ratio.")


class DPPOConfig(Section):
    """`loss_mode: dppo_tv`. How far the probability of a token may move before it is masked."""

    max_increase: PositiveFloat = Field(0.2, description="A > 0: largest pi_theta(y) - pi_old(y).")
    max_decrease: PositiveFloat = Field(0.2, description="A < 0: largest pi_old(y) - pi_theta(y).")
    max_weight: PositiveFloat = Field(20.0, description="Largest weight of A log pi.")


class GBPOConfig(Section):
    """`loss_mode: gbpo`. The target that the ratio is drawn to."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Smallest target 1 - clip_low.")
    clip_high: PositiveFloat = Field(0.2, description="Largest target 1 + clip_high.")
    temperature: PositiveFloat = Field(
        1.0, description="The smaller, the closer targets come to the ends of that range."
    )
