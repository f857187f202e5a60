"""Builds this rank's part of the policy."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from apo_megatron.config.model import ModelConfig
from apo_megatron.errors import ConfigError
from apo_megatron.models.layout import padded_vocab_size
from apo_megatron.models.local_modules import use_local_modules
from apo_megatron.models.packed_sequences import HOST_FIELDS
from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.models.transformer_config import build_transformer_config
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.architecture import Architecture, Llama3RopeScaling


def build_policy_model(
    architecture: Architecture, cfg: ModelConfig, parallel: ParallelContext, *, packs: bool = False
) -> list[PolicyModel]:
    """This rank's model chunks, one per virtual pipeline stage, on its device, weights at random.

    Parameters are in ``cfg.dtype`` without any wrapper; the caller adds DistributedDataParallel. ``packs``:
    whether it will be given packed sequences. Raises ConfigError where model, mesh and layer implementation
    do not fit together.
    """
    use_transformer_engine = _use_transformer_engine(architecture, cfg, parallel, packs)
    config = build_transformer_config(
        architecture, cfg, parallel.dims, parallel.device, use_transformer_engine
    )
    num_chunks = parallel.dims.virtual_pipeline or 1
    chunks = []
    for index in range(num_chunks):
        vp_stage = index if num_chunks > 1 else None
        first = is_pp_first_stage(parallel.pipeline_group) and is_vp_first_stage(vp_stage, num_chunks)
        last = is_pp_last_stage(parallel.pipeline_group) and is_vp_last_stage(vp_stage, num_chunks)
        # Latent attention has its rotary embedding, and its scaling, in the configuration.
        scaling = architecture.rope_scaling
        llama3 = scaling if isinstance(scaling, Llama3RopeScaling) else None
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
            rope_scaling=llama3 is not None,
            rope_scaling_factor=llama3.factor if llama3 else 1.0,
            vp_stage=vp_stage,
            max_logits_bytes=cfg.max_logits_mib * 2**20,
        )
        _mark_experts(chunk)
        _adapt_to_packing(chunk)
        chunks.append(chunk.to(parallel.device))
    return chunks


def _mark_experts(chunk: torch.nn.Module) -> None:
    """Have experts summed over the ranks that hold copies of them, and updated by an optimizer of their own.

    Megatron marks them so under expert parallelism only. But these are other ranks than those of the dense
    parameters also where the two tensor axes differ; and a training checkpoint can be loaded in another
    layout only if that has the same optimizers.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _adapt_to_packing(chunk: torch.nn.Module) -> None:
    """Two habits of Megatron's that packed sequences make expensive."""
    for module in chunk.modules():
        if isinstance(module, RotaryEmbedding):
            # Its cache would keep a table for each of the last 32 longest lengths: gigabytes. They are quick
            # to make.
            module.forward = partial(type(module).forward.__wrapped__, module)
        elif hasattr(module, "kept_packed_seq_params"):
            # TransformerEngine's attention: what PackedSequences has for the rotary embedding only.
            cast(set[str], module.kept_packed_seq_params).difference_update(HOST_FIELDS)


def _use_transformer_engine(
    architecture: Architecture, cfg: ModelConfig, parallel: ParallelContext, packs: bool
) -> bool:
    problem = None
    if not HAVE_TE or parallel.device.type == "cpu":
        problem = (
            f"needs a GPU and TransformerEngine; found device {parallel.device.type}, TransformerEngine "
            f"{'present' if HAVE_TE else 'absent'}"
        )
    elif cfg.dtype == "float32" and (packs or parallel.dims.context > 1):
        problem = (
            "has no attention in float32 for packed sequences (train.max_tokens_per_micro_batch) or context "
            "parallelism: set model.dtype=bfloat16"
        )
    elif architecture.latent_attention is not None and parallel.dims.context > 1:
        problem = "has no latent attention for context parallelism"
    if problem is not None and cfg.transformer_impl == "transformer_engine":
        raise ConfigError(f"model.transformer_impl=transformer_engine {problem}. Use auto or local")
    return problem is None and cfg.transformer_impl != "local"


def _layer_spec(
    config: TransformerConfig, use_transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this stage, dense or with experts, and the final norm."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    return block if use_transformer_engine else use_local_modules(block, config)
