"""The model chunks of a rank as parts of data-parallel ones: gradient buffers, who reduces them, and when."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.parallel.dims import ParallelDims


def data_parallel_chunks(models: Sequence[PolicyModel], dims: ParallelDims) -> list[DistributedDataParallel]:
    """The chunks of this stage with fp32 gradient buffers, reduced over the ranks that have other tokens."""
    cfg = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=dims.distributed_optimizer,
        overlap_grad_reduce=dims.overlap_grad_reduce,
        overlap_param_gather=dims.overlap_param_gather,
    )
    config = models[0].config
    chunks = [
        # Reducing the later chunks of a stage overlaps with computing the earlier ones anyway.
        DistributedDataParallel(config, cfg, model, disable_bucketing=number > 0)
        for number, model in enumerate(models)
    ]
    # The loss is already divided by the denominators of the whole mini-batch.
    config.finalize_model_grads_func = _finalize_without_rescaling
    if dims.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return chunks


def _finalize_without_rescaling(model: list[torch.nn.Module], _num_tokens: object, **kwargs: object) -> None:
    finalize_model_grads(model, None, **kwargs)
