"""Architecture, model settings and mesh -> Megatron's TransformerConfig, checked before anything is built."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from apo_megatron.config.model import ModelConfig
from apo_megatron.models.expert_config import expert_settings
from apo_megatron.models.layout import check_layout
from apo_megatron.parallel.dims import ParallelDims
from apo_megatron.weights.architecture import Architecture, YarnRopeScaling

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(
    architecture: Architecture,
    cfg: ModelConfig,
    dims: ParallelDims,
    device: torch.device,
    use_transformer_engine: bool = False,
) -> TransformerConfig:
    """TransformerConfig of this model on this mesh. Raises ConfigError where they do not fit."""
    check_layout(architecture, dims)
    dtype = TORCH_DTYPES[cfg.dtype]
    config_class = TransformerConfig if architecture.latent_attention is None else MLATransformerConfig
    return config_class(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm or architecture.latent_attention is not None,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        # False would also drop the tensor_model_parallel marks that the gradient norm needs.
        perform_initialization=True,
        # The loss is already divided by the whole mini-batch's count; Megatron must not average again.
        calculate_per_token_loss=True,
        # The fused kernels are CUDA or Apex extensions; plain ones give the same numbers everywhere.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_latent_attention_settings(architecture),
        **expert_settings(architecture, dims, device, use_transformer_engine),
        **_parallel_settings(dims, device),
        **_recompute_settings(cfg),
    )


def _parallel_settings(dims: ParallelDims, device: torch.device) -> dict[str, Any]:
    interleaved = dims.virtual_pipeline is not None
    return {
        "tensor_model_parallel_size": dims.tensor,
        "pipeline_model_parallel_size": dims.pipeline,
        "virtual_pipeline_model_parallel_size": dims.virtual_pipeline,
        "context_parallel_size": dims.context,
        "sequence_parallel": dims.sequence_parallel,
        # The interleaved schedule at two stages deadlocks with batched sends.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        # Gloo may still be sending an output that the interleaved schedule frees: silently wrong gradients.
        "deallocate_pipeline_outputs": not (interleaved and device.type == "cpu"),
    }


def _latent_attention_settings(architecture: Architecture) -> dict[str, Any]:
    """Sizes and rotary embedding of latent attention, which has both to itself; {} for other attention."""
    latent = architecture.latent_attention
    if latent is None:
        return {}
    settings: dict[str, Any] = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rotary_base": architecture.rope_theta,
    }
    scaling = architecture.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return {**settings, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    return {
        **settings,
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": scaling.mscale,
        "mscale_all_dim": scaling.mscale_all_dim,
    }


def _recompute_settings(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if cfg.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
