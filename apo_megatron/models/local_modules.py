"""Modules that need neither TransformerEngine nor Apex, plugged into Megatron through its layer specs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from apo_megatron.models.packed_sequences import PackedSequences, context_positions

# Two places where Megatron-Core 0.16 trips over the absence of TransformerEngine.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # the router asks whether it is None, but the name does not exist
multi_latent_attention.HAVE_TE = HAVE_TE  # its own test is an import that succeeds, with mocks


class SPRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism.

    Under sequence parallelism every rank normalises its own part of the sequence, so Megatron must sum the
    weight's gradient over the tensor-parallel group; it looks for this mark.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_spec_arguments: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(torch.nn.Module):
    """Causal attention on ``scaled_dot_product_attention``, with grouped queries.

    q [S, B, heads, D], k [S, B, kv_heads, D] and v [S, B, kv_heads, D'] -> [S, B, heads * D'], or the same
    without B where the sequences are packed. Right padding needs no mask: a real position never sees what
    comes after it. Under context parallelism S is this rank's part (``context_positions``); keys and values
    of all are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_spec_arguments: Any,
    ) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale
        self.context_size = config.context_parallel_size
        if self.context_size > 1:
            assert pg_collection is not None
            self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None, "only plain causal attention"
        if packed_seq_params is None:
            lengths = (len(query) * self.context_size,)
            return self._attend(query, key, value, lengths).flatten(2)
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        return self._attend(query, key, value, packed_seq_params.lengths).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if self.context_size > 1:
            order = _order_of_gathered(lengths, self.context_size, key.device)
            key, value = (
                gather_from_sequence_parallel_region(tensor, group=self.context_group)[order]
                for tensor in (key, value)
            )
        outputs = [
            self._attend_causally(query[queries], key[keys], value[keys])
            for queries, keys in self._chunks(lengths)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunks(self, lengths: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
        """Consecutive queries of this rank, and the keys up to the last of them in their sequence."""
        first_query = first_key = 0
        for length in lengths:
            if self.context_size == 1:
                numbers, chunk = [0], length
            else:
                rank = self.context_group.rank()
                numbers = [rank, 2 * self.context_size - 1 - rank]
                chunk = length // (2 * self.context_size)
            for number in numbers:
                yield (
                    slice(first_query, first_query + chunk),
                    slice(first_key, first_key + (number + 1) * chunk),
                )
                first_query += chunk
            first_key += length

    def _attend_causally(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Where there are more keys than queries, the last query sees all of them."""
        is_square = len(query) == len(key)
        mask = None if is_square else causal_lower_right(len(query), len(key))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_square,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.permute(2, 0, 1, 3)


@lru_cache(maxsize=4)
def _order_of_gathered(lengths: tuple[int, ...], world: int, device: torch.device) -> Tensor:
    """Where each position of the sequences lies in what is gathered from all context-parallel ranks."""
    gathered = np.concatenate([context_positions(lengths, rank, world) for rank in range(world)])
    return torch.from_numpy(np.argsort(gathered)).to(device)


class ReplicatedLinear(torch.nn.Module):
    """[..., in] -> [..., out] without bias, with the whole weight [out, in] on every tensor-parallel rank.

    Under sequence parallelism each rank projects its own part of the sequence; see SPRMSNorm for the mark.
    """

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        return F.linear(inputs, self.weight), None  # Megatron's linear layers return a bias too


class ReplicatedLatentAttention(MLASelfAttention):
    """Multi-latent attention whose projections to the latents are on every rank, as TransformerEngine has it.

    Megatron's local layers divide their rows, where the norm and the split that follow need all of them.
    """

    def __init__(self, config: MLATransformerConfig, *positional: Any, **keywords: Any) -> None:
        super().__init__(config, *positional, **keywords)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, config.q_lora_rank, config)
        self.linear_kv_down_proj = ReplicatedLinear(
            config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, config
        )


def use_local_modules(
    block: TransformerBlockSubmodules, config: TransformerConfig
) -> TransformerBlockSubmodules:
    """Put the modules of this file into the local layer specs of ``block``, and return it."""
    for layer in {id(layer): layer for layer in block.layer_specs}.values():
        _use_in_layer(layer, config)
    block.layer_norm = SPRMSNorm
    return block


def _use_in_layer(layer: ModuleSpec, config: TransformerConfig) -> None:
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = SPRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    # Checkpoints use TransformerEngine's names, which has norms inside the projections that follow them.
    names = {}
    if config.multi_latent_attention:
        parts.self_attention.module = ReplicatedLatentAttention
        attention.q_layernorm = attention.kv_layernorm = SPRMSNorm
        for latent in ("q", "kv"):
            names[f"self_attention.{latent}_layernorm."] = (
                f"self_attention.linear_{latent}_up_proj.layer_norm_"
            )
    else:
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = SPRMSNorm
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if parts.mlp.module is not MoELayer:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = names
