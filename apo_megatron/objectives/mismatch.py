"""The engine that draws the samples is not quite the policy that is trained: how far off, and what to do.

The same weights give other log-probs in another implementation or precision, and samples may come from older
weights. rho = pi_old / pi_rollout of the sampled token says by how much: pi_old by the actor's own pass,
pi_rollout as the engine reported it when it drew the token. All tensors are [T] float; rho is held within
exp(+-20), as the importance ratio is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.corrections import MISMATCH_CORRECTIONS, CorrectedTokens, off_policy_masked
from apo_megatron.objectives.interface import LossInputs, TokenMetric
from apo_megatron.objectives.kl import kl_k3
from apo_megatron.objectives.ratios import importance_ratio
from apo_megatron.objectives.sequences import WholeSequences


def corrected_loss(loss: Tensor, weights: Tensor | None) -> Tensor:
    """The policy loss of each token times its weight, [T]; a masked token has loss 0 and gradient 0.

    The denominators of the aggregation stay those of all trained tokens.
    """
    return loss if weights is None else torch.where(weights == 0, 0.0, weights * loss)


@torch.no_grad()
def policy_loss_weights(
    inputs: LossInputs, cfg: ObjectiveConfig
) -> tuple[Tensor | None, dict[str, TokenMetric]]:
    """What the policy loss of each token is multiplied by, [T], None if by nothing; and metrics.

    The mismatch correction, times 0 for what the off-policy mask drops (``off_policy_masked_share``).
    """
    weights, metrics = None, {}
    if cfg.mismatch_correction != "none":
        assert inputs.rollout_log_probs is not None
        weights = mismatch_weights(inputs.old_log_probs, inputs.rollout_log_probs, cfg, inputs.sequences)
    if cfg.off_policy_mask is not None:
        is_masked = off_policy_masked(inputs, cfg.off_policy_mask)
        kept = torch.ones_like(inputs.old_log_probs) if weights is None else weights
        weights = torch.where(is_masked, 0.0, kept)
        metrics["off_policy_masked_share"] = TokenMetric(is_masked)
    return weights, metrics


@torch.no_grad()
def mismatch_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    cfg: ObjectiveConfig,
    sequences: WholeSequences | None = None,
) -> Tensor:
    """The weights of ``mismatch_correction``, [T] (``corrections.py``)."""
    return _corrected(importance_ratio(old_log_probs, rollout_log_probs), cfg, sequences).weights


@torch.no_grad()
def mismatch_metrics(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    cfg: ObjectiveConfig,
    sequences: WholeSequences | None = None,
) -> dict[str, TokenMetric]:
    """The gap |log rho| in nats, its largest value, k3 of KL(pi_rollout || pi_old), whose samples these are,
    rho itself, and the share of tokens whose weight is not rho because it was truncated or masked.
    """
    ratio = importance_ratio(old_log_probs, rollout_log_probs)
    gap = (old_log_probs - rollout_log_probs).abs()
    return {
        "mismatch/log_prob_gap_mean": TokenMetric(gap),
        "mismatch/log_prob_gap_max": TokenMetric(gap, reduction="max"),
        "mismatch/kl_k3": TokenMetric(kl_k3(rollout_log_probs, old_log_probs)),
        "mismatch/ratio": TokenMetric(ratio, quantiles=True),
        "mismatch/corrected_share": TokenMetric(_corrected(ratio, cfg, sequences).is_changed),
    }


def _corrected(ratio: Tensor, cfg: ObjectiveConfig, sequences: WholeSequences | None) -> CorrectedTokens:
    return MISMATCH_CORRECTIONS[cfg.mismatch_correction].function(ratio, cfg, sequences)
