"""What to watch, per token. Names are the field's; the same names come out for no token at all (T = 0)."""

from __future__ import annotations

import torch
from torch import Tensor

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.interface import LossInputs, TokenMetric
from apo_megatron.objectives.kl import kl_k3
from apo_megatron.objectives.ratios import anchor_ratio, importance_ratio, rectified_ratio
from apo_megatron.objectives.surrogates import ClippedTokens

Metrics = dict[str, TokenMetric]
PULL_FRACTION = "pull_fraction"


def clip_metrics(clipped: ClippedTokens, advantages: Tensor) -> Metrics:
    """Which tokens have no gradient, because they are clipped or masked; tensors are [T].

    ``clip_fraction_low`` (A < 0), ``clip_fraction_high`` (A > 0) and ``dual_clip_fraction`` (A < 0) are
    shares of all tokens; ``rectified_clip_fraction`` is the share of the tokens with A < 0 that are clipped
    on either side.
    """
    metrics = {
        "clip_fraction_low": TokenMetric(clipped.low),
        "clip_fraction_high": TokenMetric(clipped.high),
    }
    is_clipped = clipped.low
    if clipped.dual is not None:
        metrics["dual_clip_fraction"] = TokenMetric(clipped.dual)
        is_clipped = is_clipped | clipped.dual
    return {**metrics, "rectified_clip_fraction": TokenMetric(is_clipped, advantages < 0)}


def bound_metrics(is_low: Tensor, is_high: Tensor) -> Metrics:
    """Which tokens are held at a bound but keep a gradient, as shares of all tokens; tensors are [T] bool."""
    return {"bound_fraction_low": TokenMetric(is_low), "bound_fraction_high": TokenMetric(is_high)}


@torch.no_grad()
def policy_metrics(inputs: LossInputs) -> Metrics:
    """Distance to the old policy; ``kl_old`` is k3 of KL(pi_old || pi_theta), whose samples these are:
    r - 1 - log r.
    """
    return {
        "importance_ratio": TokenMetric(
            importance_ratio(inputs.log_probs, inputs.old_log_probs), quantiles=True
        ),
        "kl_old": TokenMetric(kl_k3(inputs.old_log_probs, inputs.log_probs)),
        "wrong_token_fraction": TokenMetric(inputs.advantages < 0),
    }


@torch.no_grad()
def reference_metrics(inputs: LossInputs, has_reference: Tensor) -> Metrics:
    """``kl_reference``: k3 of KL(pi_theta || pi_ref) on the tokens of ``has_reference`` [T] bool."""
    if inputs.reference_log_probs is None:
        return {}
    return {"kl_reference": TokenMetric(kl_k3(inputs.log_probs, inputs.reference_log_probs), has_reference)}


@torch.no_grad()
def support_metrics(inputs: LossInputs, cfg: ObjectiveConfig) -> Metrics:
    """P, Z, a and the coverage of the reference Top-K, on tokens with A < 0 (the others have no reference).

    ``support_coverage`` is the sum of pi_theta over M: P, plus pi_theta(y) where y is in M and was left
    out of S. In float64, because masses go far below what fp32 can hold.
    """
    if inputs.anchor_log_mass is None or inputs.reference_anchor_log_mass is None:
        return {}
    is_wrong = inputs.advantages < 0
    log_mass, reference_log_mass = inputs.anchor_log_mass.double(), inputs.reference_anchor_log_mass.double()
    anchor_mass = log_mass.exp()
    ratio = anchor_ratio(log_mass, reference_log_mass)
    metrics = {
        "anchor_mass": TokenMetric(anchor_mass, is_wrong, quantiles=True),
        "reference_anchor_mass": TokenMetric(reference_log_mass.exp(), is_wrong, quantiles=True),
        "anchor_ratio": TokenMetric(ratio, is_wrong, quantiles=True),
    }
    if inputs.sampled_in_support is not None:
        excluded = inputs.sampled_in_support & cfg.apo_exclude_sampled
        sampled_mass = torch.where(excluded, inputs.log_probs.double().exp(), 0.0)
        metrics["support_coverage"] = TokenMetric(anchor_mass + sampled_mass, is_wrong)
        metrics["sampled_in_support"] = TokenMetric(inputs.sampled_in_support, is_wrong)
    return metrics


@torch.no_grad()
def pull_metrics(inputs: LossInputs, cfg: ObjectiveConfig, corrections: Tensor | None) -> Metrics:
    """``pull_fraction``: the share of the tokens with A < 0 on which the pull of APO acted.

    It acts on a token where the gradient of its policy loss with respect to log P is not zero: A < 0,
    pull_coeff > 0, S is not empty (a > 0), r~ is inside the clip range, and its loss is not multiplied by 0:
    ``corrections`` of ``mismatch.policy_loss_weights``. On none where ``apo_variants.detach_pull`` leaves it
    no gradient.
    """
    assert inputs.anchor_log_mass is not None and inputs.reference_anchor_log_mass is not None
    is_wrong = inputs.advantages < 0
    anchor = anchor_ratio(inputs.anchor_log_mass, inputs.reference_anchor_log_mass)
    ratio = importance_ratio(inputs.log_probs, inputs.old_log_probs)
    rectified = rectified_ratio(ratio, anchor, inputs.advantages, cfg.apo_push_coeff, cfg.apo_pull_coeff)
    # On the bounds themselves the clamp of the surrogate lets the gradient through.
    is_pulled = is_wrong & (anchor > 0) & (rectified >= 1 - cfg.clip_low)
    if cfg.dual_clip is not None:
        is_pulled &= rectified <= cfg.dual_clip
    if corrections is not None:
        is_pulled &= corrections != 0
    has_pull = cfg.apo_pull_coeff > 0 and not cfg.apo_variants.detach_pull
    return {PULL_FRACTION: TokenMetric(is_pulled & has_pull, is_wrong)}
