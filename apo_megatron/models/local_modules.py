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
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SDPACoreAttention(torch.nn.Module):
    """Causal attention on ``scaled_dot_product_attention``, with grouped queries.

    Padded batches: q [S, B, heads, D], k and v [S, B, kv_heads, D] -> [S, B, heads * D]. Right padding
    needs no mask: a real position never sees what comes after it. Packed sequences (``thd``):
    q [T, heads, D], k and v [T, kv_heads, D] and cumulative lengths -> [T, heads * D], each on its own.
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
        if packed_seq_params is None:
            batched = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._causal(*batched).permute(2, 0, 1, 3).flatten(2)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        outputs = []
        for start, end in zip(ends, ends[1:], strict=False):
            sequence = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
            outputs.append(self._causal(*sequence).squeeze(0).transpose(0, 1))
        return torch.cat(outputs).flatten(1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, S, D] each -> [B, heads, S, D]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
