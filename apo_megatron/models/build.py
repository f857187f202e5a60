"""Builds this rank's part of the policy."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from apo_megatron.config.schema import ModelConfig
from apo_megatron.errors import ConfigError
from apo_megatron.models.local_modules import SDPACoreAttention, SPRMSNorm
from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.models.transformer_config import build_transformer_config, padded_vocab_size
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.architecture import Architecture


def build_policy_model(
    architecture: Architecture, cfg: ModelConfig, parallel: ParallelContext
) -> list[PolicyModel]:
    """This rank's model chunks, one per virtual pipeline stage, on its device, weights at random.

    Parameters are in ``cfg.dtype`` without any wrapper; the caller adds DistributedDataParallel. Raises
    ConfigError where model, mesh and layer implementation do not fit together.
    """
    use_transformer_engine = _use_transformer_engine(cfg, parallel.device)
    config = build_transformer_config(architecture, cfg, parallel.dims, parallel.device)
    num_chunks = parallel.dims.virtual_pipeline or 1
    chunks = []
    for index in range(num_chunks):
        vp_stage = index if num_chunks > 1 else None
        first = is_pp_first_stage(parallel.pipeline_group) and is_vp_first_stage(vp_stage, num_chunks)
        last = is_pp_last_stage(parallel.pipeline_group) and is_vp_last_stage(vp_stage, num_chunks)
        scaling = architecture.rope_scaling
        chunk = PolicyModel(
            config,
            _layer_spec(config, use_transformer_engine, vp_stage),
            vocab_size=padded_vocab_size(
                architecture.vocab_size, cfg.make_vocab_size_divisible_by, parallel.dims.tensor
            ),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling else 1.0,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(parallel.device))
    return chunks


def _use_transformer_engine(cfg: ModelConfig, device: torch.device) -> bool:
    available = HAVE_TE and device.type != "cpu"
    if cfg.transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            f"model.transformer_impl=transformer_engine needs a GPU and TransformerEngine; found "
            f"device {device.type}, TransformerEngine {'present' if HAVE_TE else 'absent'}. Use auto or local"
        )
    return available and cfg.transformer_impl != "local"


def _layer_spec(
    config: TransformerConfig, use_transformer_engine: bool, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    if use_transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SPRMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SPRMSNorm
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SPRMSNorm)
