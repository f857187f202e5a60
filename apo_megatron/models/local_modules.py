"""Two layers that need neither TransformerEngine nor Apex, plugged into Megatron through its layer spec."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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

    q [S, B, heads, D], k and v [S, B, kv_heads, D] -> [S, B, heads * D]. Right padding needs no mask: a real
    position never sees what comes after it.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_spec_arguments: Any
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1 and config.attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert attention_mask is None and attention_bias is None, "only plain causal attention"
        assert packed_seq_params is None, "packed sequences are not supported"
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.permute(2, 0, 1, 3).flatten(2)
