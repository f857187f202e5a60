"""Settings of the policy losses that have any of their own, each a small section named after its method.

Formulas: docs/methods.md. A loss gets the whole ``ObjectiveConfig``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, rule

PolicyLossName = Literal[
    "apo_ratio",
    "vanilla",
    "cispo",
    "dispo",
    "sapo",
    "gppo",
    "dcpo_clip",
    "dppo_tv",
    "gspo",
    "ctpo",
    "vespo",
    "simko",
    "topk_forward_kl",
    "clip_cov",
    "kl_cov",
    "bapo",
    "p3o",
    "dmpo",
    "gbpo",
]
# They compare the samples of a prompt, which must be in one mini-batch.
WHOLE_GROUPS = ("dmpo",)


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


class GSPOConfig(Section):
    """`loss_mode: gspo`. Clip range of the geometric mean of the ratio over an answer."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(3e-4, description="Clipped under 1 - clip_low.")
    clip_high: PositiveFloat = Field(4e-4, description="Clipped over 1 + clip_high.")


class CTPOConfig(Section):
    """`loss_mode: ctpo`. Bounds of the log of the cumulative ratio at the t-th token, in units of t^power."""

    low: PositiveFloat = Field(0.025, description="A < 0: clipped under exp(-low t^power).")
    high: PositiveFloat = Field(0.05, description="A > 0: clipped over exp(high t^power).")
    dual: PositiveFloat = Field(0.05, description="A < 0: clipped over exp(dual t^power).")
    power: float = Field(0.5, description="How the bounds widen; with geometric_mean the authors use -0.5.")
    geometric_mean: bool = Field(False, description="The mean of log r up to the token, not the sum.")


class VESPOConfig(Section):
    """`loss_mode: vespo`. Weight W^power exp(decay (1 - W)) of an answer, W = product of its ratios."""

    right_power: PositiveFloat = Field(2.0, description="k where A > 0.")
    right_decay: PositiveFloat = Field(3.0, description="l where A > 0.")
    wrong_power: PositiveFloat = Field(3.0, description="k where A < 0.")
    wrong_decay: PositiveFloat = Field(2.0, description="l where A < 0.")


class SimKOConfig(Section):
    """`loss_mode: simko`. What happens at the uncertain tokens of an answer."""

    topk: PositiveInt = Field(3, description="K: likeliest tokens of the policy that share an update.")
    mix: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="alpha, A > 0: share of the update that goes to these K tokens."
    )
    entropy_quantile: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="tau: tokens above this quantile of the entropies of their answer are uncertain."
    )
    wrong_top1_factor: PositiveFloat = Field(
        1.1, description="A < 0: factor of A where the sampled token is the policy's likeliest."
    )


class TopKForwardKLConfig(Section):
    """`loss_mode: topk_forward_kl`. A baseline of this project: forward KL on the reference's Top-K
    (`apo_topk`)."""

    weight: NonNegativeFloat = Field(0.05, description="Weight of the KL; 0 is vanilla.")
    solve_rate_weighting: bool = Field(
        True, description="Multiply the weight by (1 - share of right answers to the prompt)^2."
    )


class APOVariantsConfig(Section):
    """`loss_mode: apo_ratio`. Changes to APO for research, all off by default: docs/methods.md, Variants."""

    detach_pull: bool = Field(False, description="The anchor ratio only gates: no gradient through it.")
    final_push_coeff: PositiveFloat | None = Field(
        None, description="Where lambda ends that starts at apo_push_coeff."
    )
    final_pull_coeff: NonNegativeFloat | None = Field(
        None, description="Where beta ends that starts at apo_pull_coeff."
    )
    schedule_steps: PositiveInt | None = Field(
        None, description="Steps from start to end, linearly; constant afterwards."
    )
    target_anchor_ratio: PositiveFloat | None = Field(
        None, description="Adapt beta to hold (mean P) / (mean Z) there; 1 = the reference's mass."
    )
    adaptation_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="Adapted beta: change of log beta for a relative error of 1."
    )
    min_pull_coeff: PositiveFloat = Field(0.01, description="Adapted beta: smallest value.")
    max_pull_coeff: PositiveFloat = Field(0.2, description="Adapted beta: largest value.")
    support_mass: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Top-P: the support is the smallest prefix of the Top-K of so much reference mass."
    )
    reference_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="The reference follows the policy: d * reference + (1 - d) * policy a step."
    )

    @rule
    def schedule_has_start_and_end(self) -> str | None:
        """`schedule_steps` goes with `final_push_coeff`, `final_pull_coeff` or both; neither without it."""
        has_end = self.final_push_coeff is not None or self.final_pull_coeff is not None
        if has_end != (self.schedule_steps is not None):
            return (
                f"schedule_steps={'null' if self.schedule_steps is None else self.schedule_steps} with "
                f"{'an end value' if has_end else 'neither final_push_coeff nor final_pull_coeff'}: a "
                "schedule needs both a number of steps and an end; give both, or leave both out"
            )
        return None

    @rule
    def adaptation_has_a_target(self) -> str | None:
        """`adaptation_rate`, `min_pull_coeff` and `max_pull_coeff` go with `target_anchor_ratio`."""
        fields = ("adaptation_rate", "min_pull_coeff", "max_pull_coeff")
        given = [name for name in fields if getattr(self, name) != type(self).model_fields[name].default]
        if given and self.target_anchor_ratio is None:
            return (
                f"{', '.join(given)} without target_anchor_ratio: nothing adapts the pull; set "
                "target_anchor_ratio, or leave them out"
            )
        return None

    @rule
    def pull_is_scheduled_or_adapted(self) -> str | None:
        """`final_pull_coeff` and `target_anchor_ratio` exclude each other: both would move beta."""
        if self.final_pull_coeff is not None and self.target_anchor_ratio is not None:
            return (
                f"final_pull_coeff={self.final_pull_coeff} and target_anchor_ratio="
                f"{self.target_anchor_ratio} both move apo_pull_coeff: leave one of them out"
            )
        return None


class ClipCovConfig(Section):
    """`loss_mode: clip_cov`. Which tokens of high covariance lose their gradient, beside those PPO clips."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(
        2e-4, description="Tokens drawn, as a share of the mini-batch's; at least one where it is not 0."
    )
    covariance_low: float = Field(1.0, description="Drawn from tokens of a larger covariance ...")
    covariance_high: float = Field(5.0, description="... and of a smaller one.")
    clip_low: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Ratio clipped under 1 - clip_low; 1 = no lower bound."
    )
    clip_high: PositiveFloat = Field(1.0, description="Ratio clipped over 1 + clip_high.")

    @rule
    def covariances_are_in_order(self) -> str | None:
        """`covariance_low` of `clip_cov` must be below `covariance_high`: tokens between them are drawn."""
        if self.covariance_low >= self.covariance_high:
            return (
                f"covariance_low={self.covariance_low} is not below covariance_high={self.covariance_high}, "
                "and no token lies between them: lower it, or raise covariance_high"
            )
        return None


class KLCovConfig(Section):
    """`loss_mode: kl_cov`. How many tokens of the highest covariance are held back, and how much."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(
        2e-3, description="Tokens held, as a share of the mini-batch's; at least one where it is not 0."
    )
    coeff: NonNegativeFloat = Field(1.0, description="Weight of |log r| on these tokens.")


class BAPOConfig(Section):
    """`loss_mode: bapo`. Bounds of the ratio, moved in every mini-batch until right answers weigh enough."""

    target: NonNegativeFloat = Field(
        0.5, description="Wanted sum of A over A >= 0, relative to A < 0; 0 = first bounds."
    )
    low_start: Annotated[float, Field(gt=0, lt=1)] = Field(0.8, description="First lower bound.")
    low_max: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="Last lower bound.")
    # A step far smaller would be searched for hours.
    low_step: Annotated[float, Field(ge=1e-3)] = Field(
        0.05, description="The lower bound is raised by so much, first."
    )
    high_start: Annotated[float, Field(gt=1)] = Field(1.2, description="First upper bound.")
    high_max: Annotated[float, Field(gt=1)] = Field(2.0, description="Last upper bound.")
    high_step: Annotated[float, Field(ge=1e-3)] = Field(
        0.1, description="The upper bound is raised by so much, then."
    )

    @rule
    def bounds_move_upwards(self) -> str | None:
        """`low_max` and `high_max` of `bapo` must not be below `low_start` and `high_start`."""
        pairs = {"low": (self.low_start, self.low_max), "high": (self.high_start, self.high_max)}
        for name, (start, largest) in pairs.items():
            if largest < start:
                return (
                    f"{name}_start={start} is above {name}_max={largest}: bounds are only raised. Raise "
                    f"{name}_max, or set both to one number for a bound that stays"
                )
        return None


class DMPOConfig(Section):
    """`loss_mode: dmpo`. The distance between two distributions over a group: the policy's and its target."""

    coeff: NonNegativeFloat = Field(2.0, description="beta: weight of the distance; 0 = vanilla.")
    temperature: PositiveFloat = Field(1 / 15, description="The target is softmax(A / temperature).")


class GBPOConfig(Section):
    """`loss_mode: gbpo`. The target that the ratio is drawn to."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Smallest target 1 - clip_low.")
    clip_high: PositiveFloat = Field(0.2, description="Largest target 1 + clip_high.")
    temperature: PositiveFloat = Field(
        1.0, description="The smaller, the closer targets come to the ends of that range."
    )
