"""Floating-point operations of a step; a multiplication and an addition are two.

A matrix product with N weights costs 2 N a token forward and 4 N backward (Kaplan et al. 2020, arXiv
2001.08361). Attention adds 2 S h (d_qk + d_v) a token forward and twice that backward, halved because a
causal kernel skips what lies in the future (Dao et al. 2022, arXiv 2205.14135). The LM head is applied to
trained tokens only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.objective import build_objective
from apo_megatron.planning.activations import Recompute
from apo_megatron.planning.workload import Workload
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.table import build_table

# The reference looks at sequences with A < 0, which nobody knows before: half of them.
WRONG_SHARE = 0.5


@dataclass(frozen=True)
class StepFlops:
    """Of all ranks together, with every sequence at its longest."""

    training: float  # forward and backward, without what is computed again
    recompute: float
    old_log_probs: float
    reference: float
    statistics: float  # the pass before an update of a loss that looks at the whole mini-batch
    rollout: float  # by whoever draws the samples

    @property
    def trainer(self) -> float:
        return self.training + self.recompute + self.old_log_probs + self.reference + self.statistics


def step_flops(
    architecture: Architecture,
    workload: Workload,
    objective_config: ObjectiveConfig,
    recompute: Recompute,
    is_fused: bool,
) -> StepFlops:
    """``is_fused``: backward makes the logits again, and so does the policy's own Top-K."""
    objective = build_objective(objective_config)
    layers = workload.num_sequences * workload.sequence_length * 2 * _weights_per_token(architecture)
    attention = workload.num_sequences * _attention_of_sequence(architecture, workload.sequence_length)
    head = (
        workload.num_sequences
        * workload.response_length
        * 2
        * architecture.vocab_size
        * architecture.hidden_size
    )
    forward = layers + attention + head
    again = {"none": 0.0, "selective": attention, "full": layers + attention}[recompute]
    if is_fused:
        again += 2 * head if objective.policy_topk else head
    share = {"none": 0.0, "wrong": WRONG_SHARE, "all": 1.0}[objective.reference_scope]
    recomputes_old = objective_config.old_log_probs == "recompute"
    num_passes = 0.0 if objective.spec.statistics is None else 1.0
    if recomputes_old:  # the first update has just those log-probs
        num_passes *= 1 - 1 / workload.num_mini_batches
    return StepFlops(
        training=3 * forward,
        recompute=again,
        old_log_probs=forward if recomputes_old else 0.0,
        reference=share * forward,
        statistics=num_passes * forward,
        rollout=forward,
    )


def _weights_per_token(architecture: Architecture) -> float:
    """Numbers of the weight matrices of all layers that one token meets: top_k experts of a layer."""
    total = 0.0
    for rule in build_table(architecture).rules:
        shape = rule.layout.local_shape(1)
        if not rule.is_per_layer or len(shape) < 2:
            continue
        number = len(rule.layers) if rule.layers is not None else architecture.num_layers
        if rule.num_experts:
            assert architecture.experts is not None
            number *= architecture.experts.top_k
        total += number * math.prod(shape)
    return total


def _attention_of_sequence(architecture: Architecture, length: int) -> float:
    """Forward, all layers, the causal half."""
    mla = architecture.latent_attention
    sizes = 2 * architecture.head_dim
    if mla is not None:
        sizes = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    return architecture.num_layers * architecture.num_heads * sizes * float(length) ** 2
