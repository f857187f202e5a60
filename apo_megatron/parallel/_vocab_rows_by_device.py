"""Who does the row work of the vocabulary end: the Triton kernels for logits on a GPU, torch otherwise."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from apo_megatron.parallel import _vocab_rows
from apo_megatron.parallel._vocab_rows import Candidates, RowStatistics

_HAS_TRITON = find_spec("triton") is not None  # CUDA builds of torch bring it


class RowFunctions(Protocol):
    """What both modules offer. ``_vocab_rows`` defines it and is what the kernels are compared with."""

    def row_statistics(self, logits: Tensor, scale: float) -> RowStatistics: ...

    def best_columns(self, logits: Tensor, k: int, scale: float) -> Candidates: ...

    def overwrite_with_gradient(
        self,
        logits: Tensor,
        scale: float,
        row_max: Tensor,
        exp_coeff: Tensor,
        weighted_coeff: Tensor | None,
        columns: Tensor,
        column_grads: Tensor,
    ) -> None: ...


def row_functions(logits: Tensor) -> RowFunctions:
    """float64 is for checks and no logits are nothing to launch a kernel for: torch does both everywhere."""
    if _HAS_TRITON and _is_on_gpu(logits) and logits.dtype != torch.float64 and logits.numel() > 0:
        return _kernels()
    return _vocab_rows


def _is_on_gpu(logits: Tensor) -> bool:
    return logits.is_cuda


def _kernels() -> RowFunctions:
    from apo_megatron.parallel import _vocab_kernels  # imports triton, which is not always there

    return _vocab_kernels
