"""The objective of a run: a loss, its regularizers and metrics, and what they need computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.corrections import MISMATCH_CORRECTIONS, OFF_POLICY_MASK_NEEDS
from apo_megatron.objectives.interface import LossInputs, MiniBatchInputs, Need, TokenMetric
from apo_megatron.objectives.mismatch import corrected_loss, policy_loss_weights
from apo_megatron.objectives.registry import POLICY_LOSSES, PolicyLossSpec
from apo_megatron.objectives.regularizers import entropy_bonus, kl_penalty
from apo_megatron.objectives.token_metrics import (
    policy_metrics,
    pull_metrics,
    reference_metrics,
    support_metrics,
)

ReferenceScope = Literal["none", "wrong", "all"]


@dataclass(frozen=True)
class Objective:
    """Callable on the tokens of one micro-batch; its properties tell the actor what to prepare."""

    spec: PolicyLossSpec
    cfg: ObjectiveConfig

    @property
    def needs(self) -> frozenset[Need]:
        """Optional inputs without which the loss cannot be computed."""
        needs: set[Need] = set(self.spec.needs)
        if self.uses_kl_penalty:
            needs.add("reference_log_probs")
        if self.uses_entropy_bonus:
            needs.add("entropy_grad")
        needs |= MISMATCH_CORRECTIONS[self.cfg.mismatch_correction].needs
        if self.cfg.off_policy_mask is not None:
            needs |= OFF_POLICY_MASK_NEEDS
        return frozenset(needs)

    @property
    def uses_kl_penalty(self) -> bool:
        return self.cfg.use_kl_loss or self.cfg.use_kl_loss_on_wrong

    @property
    def uses_entropy_bonus(self) -> bool:
        return self.cfg.entropy_coeff > 0

    @property
    def needs_reference_log_probs(self) -> bool:
        """Whether the reference pass has to keep log pi_ref(y)."""
        return "reference_log_probs" in self.needs

    @property
    def loss_needs_support(self) -> bool:
        """Whether the loss cannot be computed without the anchor support."""
        return bool(self.needs & {"anchor", "reference_topk"})

    @property
    def needs_support(self) -> bool:
        """Whether the reference pass has to keep the anchor support, for the loss or for its telemetry."""
        return self.loss_needs_support or (self.spec.uses_rollouts and self.cfg.support_telemetry)

    @property
    def needs_support_log_probs(self) -> bool:
        """Whether the reference pass has to keep log pi_ref of the whole support."""
        return "reference_topk" in self.needs

    @property
    def reference_scope(self) -> ReferenceScope:
        """Which tokens need a reference pass: none, those with A < 0, or all."""
        if self.cfg.use_kl_loss or self.needs_support_log_probs:
            return "all"
        return "wrong" if self.needs_support or self.needs_reference_log_probs else "none"

    @property
    def support_size(self) -> int:
        """K of the reference support; 0 where none is needed."""
        return self.cfg.apo_topk if self.needs_support else 0

    @property
    def policy_topk(self) -> int:
        """K of the policy's own Top-K; 0 where none is needed."""
        return 0 if self.spec.policy_topk is None else self.spec.policy_topk(self.cfg)

    @property
    def exclude_sampled(self) -> bool:
        """Whether the sampled token is left out of its anchor support (exclusive anchoring)."""
        return self.cfg.apo_exclude_sampled

    @property
    def support_mass(self) -> float | None:
        """Reference mass at which the support ends (Top-P within the Top-K); None: it is the whole Top-K."""
        return self.cfg.apo_variants.support_mass

    @property
    def reference_decay(self) -> float | None:
        """Of the moving average that the reference is; None: it stays what it was at the start."""
        return self.cfg.apo_variants.reference_decay

    def with_coefficients(self, push_coeff: float, pull_coeff: float) -> Objective:
        """The same objective with other coefficients of APO."""
        moved = {"apo_push_coeff": push_coeff, "apo_pull_coeff": pull_coeff}
        return replace(self, cfg=self.cfg.model_copy(update=moved))

    def statistics_of(self, inputs: MiniBatchInputs) -> Tensor:
        """What the loss must know of the mini-batch, [T, n] fp32, for one that declares statistics."""
        assert self.spec.statistics is not None
        found = self.spec.statistics.compute(inputs, self.cfg)
        return torch.stack([found[name] for name in self.spec.statistics.names], dim=-1).float()

    def named_statistics(self, columns: Tensor | None) -> dict[str, Tensor]:
        """``statistics_of`` by name, each [T]; {} for a loss without."""
        if self.spec.statistics is None:
            return {}
        assert columns is not None, "the update attaches them before the first micro-batch"
        return dict(zip(self.spec.statistics.names, columns.unbind(-1), strict=True))

    def __call__(self, inputs: LossInputs, weights: Tensor) -> tuple[Tensor, dict[str, TokenMetric]]:
        """This micro-batch's share of the mini-batch's loss, and its metrics.

        ``weights`` [T]: 1 / the denominator of the whole mini-batch (``aggregation.sequence_weights``). The
        scalar is sum_t weights[t] * loss[t], plus what the loss adds unweighted; the shares of all
        micro-batches and ranks add up to the loss, which is also the metric ``loss``. Tokens of weight 0 add
        exactly 0, whatever their loss is. With T = 0 the scalar is 0, still differentiable, and the names of
        the metrics are the same.
        """
        outputs = self.spec.function(inputs, self.cfg)
        corrections, metrics = policy_loss_weights(inputs, self.cfg)
        metrics |= outputs.metrics
        loss = corrected_loss(outputs.loss, corrections)
        if self.spec.uses_rollouts:
            metrics["policy_loss"] = TokenMetric(loss)
        if self.uses_kl_penalty:
            penalty = kl_penalty(inputs, self.cfg)
            loss = loss + penalty.loss
            metrics |= penalty.metrics
        if self.uses_entropy_bonus:
            loss = loss + entropy_bonus(inputs, self.cfg).loss
        shares = torch.where(weights == 0, 0.0, weights * loss)
        if outputs.unweighted is not None:
            shares = shares + torch.where(weights == 0, 0.0, outputs.unweighted)
        metrics |= self._telemetry(inputs, corrections)
        metrics["loss"] = TokenMetric(shares, reduction="sum")
        return shares.sum(), metrics

    def _telemetry(self, inputs: LossInputs, corrections: Tensor | None) -> dict[str, TokenMetric]:
        metrics = {"entropy": TokenMetric(inputs.entropy)}
        if self.spec.uses_rollouts:
            is_wrong = inputs.advantages < 0
            has_reference = torch.ones_like(is_wrong) if self.reference_scope == "all" else is_wrong
            metrics |= policy_metrics(inputs)
            metrics |= reference_metrics(inputs, has_reference)
            metrics |= support_metrics(inputs, self.cfg)
        if "anchor" in self.needs:
            metrics |= pull_metrics(inputs, self.cfg, corrections)
        return metrics


def build_objective(cfg: ObjectiveConfig) -> Objective:
    """The RL objective that a configuration describes."""
    return Objective(POLICY_LOSSES[cfg.loss_mode], cfg)


def supervised_objective() -> Objective:
    """Cross-entropy of demonstrations: no rollouts, no reference, no regularizers."""
    return Objective(POLICY_LOSSES["supervised"], ObjectiveConfig())
