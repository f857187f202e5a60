"""Settings of the objective: the policy loss and what it is combined with.

A method with settings of its own has a section: policy losses in ``policy_losses.py``, advantage estimators
in ``advantages.py``. Formulas: docs/objective.md (APO) and docs/methods.md (all others).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from apo_megatron.config.advantages import (
    GROUP_CENTRED,
    AdvantageEstimatorName,
    PassKConfig,
    PKPOConfig,
    RiskPOConfig,
    WReinforceConfig,
)
from apo_megatron.config.policy_losses import (
    APOVariantsConfig,
    BAPOConfig,
    CISPOConfig,
    ClipCovConfig,
    CTPOConfig,
    DCPOConfig,
    DISPOConfig,
    DMPOConfig,
    DPPOConfig,
    GBPOConfig,
    GPPOConfig,
    GSPOConfig,
    KLCovConfig,
    PolicyLossName,
    SAPOConfig,
    SimKOConfig,
    TopKForwardKLConfig,
    VESPOConfig,
)
from apo_megatron.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, rule

# push - pull may not lie on the clip boundary either; rounding (1.38 - 0.1 < 1.28) must not decide that.
_ROUNDING = 1e-9


class ObjectiveConfig(Section):
    """The policy loss. Names as in the paper's release; formulas in docs/objective.md and docs/methods.md."""

    loss_mode: PolicyLossName = Field(
        "apo_ratio", description="APO, GRPO/PPO clip (vanilla), or another of docs/methods.md."
    )
    advantage_estimator: AdvantageEstimatorName = Field(
        "grpo", description="How group rewards become advantages."
    )
    passk: PassKConfig = PassKConfig()
    pkpo: PKPOConfig = PKPOConfig()
    w_reinforce: WReinforceConfig = WReinforceConfig()
    riskpo: RiskPOConfig = RiskPOConfig()
    loss_aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        "token-mean", description="How token losses become one number, over the whole mini-batch."
    )
    loss_aggregation_constant: PositiveInt | None = Field(
        None, description="Divisor of seq-mean-token-sum-norm (Dr.GRPO: the longest response)."
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Ratio clipped under 1 - clip_low."
    )
    clip_high: PositiveFloat = Field(0.28, description="Ratio clipped over 1 + clip_high.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Bound of the loss at -A * dual_clip where A < 0."
    )
    apo_push_coeff: PositiveFloat = Field(1.05, description="lambda: weight of the ratio where A < 0.")
    apo_pull_coeff: NonNegativeFloat = Field(0.1, description="beta: weight of the anchor ratio where A < 0.")
    apo_topk: PositiveInt = Field(8, description="K: size of the reference support.")
    apo_exclude_sampled: bool = Field(True, description="Leave the sampled token out of the anchor support.")
    support_telemetry: bool = Field(
        True, description="Log anchor metrics for losses that do not need them (one reference pass)."
    )
    old_log_probs: Literal["recompute", "rollout"] = Field(
        "recompute", description="log pi_old by the actor's own pass, or as the engine reported it."
    )
    mismatch_correction: Literal["none", "tis", "icepop", "seq_mask_tis"] = Field(
        "none",
        description="Weights for pi_old / pi_rollout: truncated (TIS), tokens or whole answers masked.",
    )
    tis_cap: Annotated[float, Field(ge=1)] = Field(2.0, description="TIS: largest weight.")
    icepop_low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="IcePop: tokens with a smaller ratio get weight 0."
    )
    icepop_high: Annotated[float, Field(ge=1)] = Field(
        5.0, description="IcePop: tokens with a larger ratio get weight 0."
    )
    seq_mask_low: Annotated[float, Field(ge=0, le=1)] = Field(
        0.999, description="seq_mask_tis: answers with a smaller geometric mean ratio get weight 0."
    )
    seq_mask_high: Annotated[float, Field(ge=1)] = Field(
        1.002, description="seq_mask_tis: answers with a larger geometric mean ratio get weight 0."
    )
    off_policy_mask: PositiveFloat | None = Field(
        None, description="Drops answers with A < 0 whose mean log(pi_rollout / pi_theta) is above it."
    )
    use_kl_loss: bool = Field(False, description="KL to the reference on all trained tokens.")
    use_kl_loss_on_wrong: bool = Field(False, description="KL to the reference only where A < 0.")
    kl_loss_coeff: NonNegativeFloat = Field(0.02, description="Weight of either KL loss.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of that KL.")
    entropy_coeff: NonNegativeFloat = Field(0.0, description="Weight of the entropy bonus.")
    cispo: CISPOConfig = CISPOConfig()
    dispo: DISPOConfig = DISPOConfig()
    sapo: SAPOConfig = SAPOConfig()
    gppo: GPPOConfig = GPPOConfig()
    dcpo: DCPOConfig = DCPOConfig()
    dppo: DPPOConfig = DPPOConfig()
    gspo: GSPOConfig = GSPOConfig()
    ctpo: CTPOConfig = CTPOConfig()
    vespo: VESPOConfig = VESPOConfig()
    simko: SimKOConfig = SimKOConfig()
    topk_forward_kl: TopKForwardKLConfig = TopKForwardKLConfig()
    apo_variants: APOVariantsConfig = APOVariantsConfig()
    clip_cov: ClipCovConfig = ClipCovConfig()
    kl_cov: KLCovConfig = KLCovConfig()
    bapo: BAPOConfig = BAPOConfig()
    dmpo: DMPOConfig = DMPOConfig()
    gbpo: GBPOConfig = GBPOConfig()

    @rule
    def wrong_tokens_must_not_start_clipped(self) -> str | None:
        """With `apo_ratio`, `apo_push_coeff` - `apo_pull_coeff` (where a wrong token's ratio starts) must lie
        inside (1 - `clip_low`, 1 + `clip_high`), and below `dual_clip`: outside there is no gradient. So must
        those at the end of a schedule and at both bounds of an adapted pull."""
        if self.loss_mode != "apo_ratio":
            return None
        low, high = 1 - self.clip_low, min(1 + self.clip_high, self.dual_clip or math.inf)
        for push, pull in self._extreme_coefficients():
            if not low + _ROUNDING < push - pull < high - _ROUNDING:
                moved = (push, pull) != (self.apo_push_coeff, self.apo_pull_coeff)
                where = f" (apo_variants moves them to {push:.4g} and {pull:.4g})" if moved else ""
                return (
                    f"apo_push_coeff - apo_pull_coeff = {push - pull:.4g}{where} lies outside the clip range "
                    f"({low:.4g}, {high:.4g}) given by clip_low, clip_high and dual_clip: every wrong token "
                    "would start clipped, without a gradient. Bring the difference closer to 1, or widen the "
                    "clip range"
                )
        return None

    def _extreme_coefficients(self) -> list[tuple[float, float]]:
        """(push, pull) between which those of a run lie: they move linearly, or the pull within bounds."""
        variants, start = self.apo_variants, (self.apo_push_coeff, self.apo_pull_coeff)
        final_push = variants.final_push_coeff or start[0]
        if variants.target_anchor_ratio is not None:
            bounds = (variants.min_pull_coeff, variants.max_pull_coeff)
            return [start, *((push, pull) for push in (start[0], final_push) for pull in bounds)]
        return [
            start,
            (final_push, start[1] if variants.final_pull_coeff is None else variants.final_pull_coeff),
        ]

    @rule
    def variants_are_those_of_apo(self) -> str | None:
        """`apo_variants` is for `loss_mode` = apo_ratio; with any other it must be left out."""
        given = sorted(self.apo_variants.model_fields_set)
        if self.loss_mode != "apo_ratio" and self.apo_variants != APOVariantsConfig():
            return (
                f"apo_variants ({', '.join(given)}) with loss_mode={self.loss_mode}, which has no anchor: "
                "leave apo_variants out, or set loss_mode=apo_ratio"
            )
        return None

    @rule
    def adapted_pull_starts_inside_its_bounds(self) -> str | None:
        """With `apo_variants.target_anchor_ratio`, `apo_pull_coeff` must lie between `min_pull_coeff` and
        `max_pull_coeff` of `apo_variants`, and these must differ."""
        variants = self.apo_variants
        low, high = variants.min_pull_coeff, variants.max_pull_coeff
        if variants.target_anchor_ratio is not None and not (
            low < high and low <= self.apo_pull_coeff <= high
        ):
            return (
                f"apo_pull_coeff={self.apo_pull_coeff} is to be adapted between apo_variants.min_pull_coeff="
                f"{low} and max_pull_coeff={high}: it must lie there, and they must differ"
            )
        return None

    @rule
    def correction_compares_two_passes(self) -> str | None:
        """`mismatch_correction` needs `old_log_probs` = recompute: taken from the rollout, pi_old is
        pi_rollout and there is nothing to correct."""
        if self.mismatch_correction != "none" and self.old_log_probs == "rollout":
            return (
                f"mismatch_correction={self.mismatch_correction} with old_log_probs=rollout: both would be "
                "the engine's log-probs; set old_log_probs=recompute, or mismatch_correction=none"
            )
        return None

    @rule
    def one_kl_loss_at_most(self) -> str | None:
        """`use_kl_loss` and `use_kl_loss_on_wrong` exclude each other."""
        if self.use_kl_loss and self.use_kl_loss_on_wrong:
            return "use_kl_loss and use_kl_loss_on_wrong are both true: set one of them to false"
        return None

    @rule
    def constant_goes_with_its_aggregation(self) -> str | None:
        """`loss_aggregation_constant` is needed by `seq-mean-token-sum-norm` and refused with any other."""
        wanted = self.loss_aggregation == "seq-mean-token-sum-norm"
        if wanted != (self.loss_aggregation_constant is not None):
            return (
                f"loss_aggregation={self.loss_aggregation} "
                f"{'needs' if wanted else 'does not use'} loss_aggregation_constant, found "
                f"{'null' if wanted else self.loss_aggregation_constant}: "
                f"{'set it to the longest response (tokens)' if wanted else 'leave it out'}"
            )
        return None

    @rule
    def targets_and_advantages_look_at_one_group(self) -> str | None:
        """`loss_mode` = gbpo ignores the sign of A: it goes with an `advantage_estimator` that compares a
        sample with its own group alone."""
        if self.loss_mode == "gbpo" and self.advantage_estimator not in GROUP_CENTRED:
            return (
                f"loss_mode=gbpo with advantage_estimator={self.advantage_estimator}: gbpo takes the size of "
                "A and its sign from the group's median, which is another one there; choose one of "
                f"{', '.join(GROUP_CENTRED)}"
            )
        return None
