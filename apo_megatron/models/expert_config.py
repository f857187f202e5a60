"""Mixture-of-experts settings: what Megatron's router and experts can do, and what is refused."""

from __future__ import annotations

from typing import Any

import torch

from apo_megatron.errors import ConfigError
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.architecture import Architecture, Experts

# Megatron ranks the groups of experts by the sum of so many best experts; DeepSeek-V3 by that of two.
_RANKED_EXPERTS = 2


def check_experts(architecture: Architecture, dims: ParallelDims) -> None:
    """Raises ConfigError where experts and mesh do not fit, or Megatron cannot route as the model does."""
    experts = architecture.experts
    if experts is None:
        if dims.expert > 1 or dims.expert_tensor > 1:
            raise ConfigError(
                f"parallel.expert_parallel_size={dims.expert}, expert_tensor_parallel_size="
                f"{dims.expert_tensor}: a {architecture.model_type} model has no experts: set both to 1"
            )
        return
    for axis, axis_size, field, size in (
        ("expert_parallel_size", dims.expert, "num_experts", experts.num_experts),
        ("expert_tensor_parallel_size", dims.expert_tensor, "the experts' size", experts.ffn_hidden_size),
        ("tensor_parallel_size", dims.tensor, "the shared experts' size", experts.shared_ffn_hidden_size),
    ):
        if size % axis_size:
            raise ConfigError(
                f"parallel.{axis}={axis_size} must divide {field}={size} of the model: choose a divisor of "
                f"{size}"
            )
    if dims.tensor > 1 and not dims.sequence_parallel:
        raise ConfigError(
            f"parallel.tensor_parallel_size={dims.tensor} with experts needs sequence_parallel=true, so that "
            "every rank routes tokens of its own: set it, or tensor_parallel_size=1"
        )
    _check_routing(experts)


def _check_routing(experts: Experts) -> None:
    if experts.top_k == 1 and experts.normalize_top_k:
        raise ConfigError(
            "num_experts_per_tok=1 with weights that sum to 1 is not supported: Megatron weighs a single "
            "expert by its score"
        )
    if _groups_matter(experts):
        assert experts.top_k_groups is not None
        if experts.top_k != _RANKED_EXPERTS * experts.top_k_groups:
            raise ConfigError(
                f"topk_group={experts.top_k_groups} with num_experts_per_tok={experts.top_k} is not "
                f"supported: Megatron chooses groups as the model does only where num_experts_per_tok is "
                f"{_RANKED_EXPERTS} x topk_group"
            )


def _groups_matter(experts: Experts) -> bool:
    """Choosing from all groups is choosing from all experts."""
    return experts.num_groups is not None and experts.top_k_groups != experts.num_groups


def expert_settings(
    architecture: Architecture, dims: ParallelDims, device: torch.device, use_transformer_engine: bool
) -> dict[str, Any]:
    """Megatron's settings for the model's experts; {} for a dense model."""
    experts = architecture.experts
    if experts is None:
        return {}
    has_groups = _groups_matter(experts)
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        # A list also tells Megatron that layers have keys of their own in checkpoints.
        "moe_layer_freq": 1 if architecture.layers_are_alike else [int(has) for has in experts.layers],
        "moe_router_topk": experts.top_k,
        "moe_router_score_function": experts.score_function,
        # Softmax over all experts, or over the chosen ones: then the weights sum to 1.
        "moe_router_pre_softmax": not experts.normalize_top_k,
        "moe_router_topk_scaling_factor": experts.scaling_factor,
        "moe_router_num_groups": experts.num_groups if has_groups else None,
        "moe_router_group_topk": experts.top_k_groups if has_groups else None,
        "moe_router_dtype": "fp32",
        # The policy gradient alone moves the model: no balancing loss, and a bias that stays as it is.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_enable_expert_bias": experts.selection_bias,
        "moe_router_bias_update_rate": 0.0,
        "expert_model_parallel_size": dims.expert,
        "expert_tensor_parallel_size": dims.expert_tensor,
        "moe_grouped_gemm": use_transformer_engine,
        # All-to-all sends less; it is written with CUDA streams.
        "moe_token_dispatcher_type": "allgather" if device.type == "cpu" else "alltoall",
    }
