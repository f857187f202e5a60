"""What a loss must know of the whole mini-batch before its first micro-batch."""

from __future__ import annotations

from torch import Tensor

from apo_megatron.objectives.interface import MiniBatchInputs
from apo_megatron.objectives.objective import Objective
from apo_megatron.parallel.collectives import gather_over_data_parallel, sum_over_data_parallel
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import PaddedSequences


def loss_statistics(
    mini_batch: PaddedSequences, log_probs: Tensor, objective: Objective, parallel: ParallelContext
) -> Tensor:
    """[T, n] fp32 of this rank's tokens, in the mask's order as their current ``log_probs`` [T] are.

    Collective over the data-parallel ranks of the last stage; the context- and tensor-parallel ranks of one
    share of the data find the same.
    """
    mask = mini_batch.loss_mask
    assert mini_batch.old_log_probs is not None and mini_batch.draw_seeds is not None
    assert mini_batch.groups is not None

    def sum_over_ranks(values: Tensor) -> Tensor:
        return sum_over_data_parallel(values.clone().to(parallel.device), parallel).cpu()

    return objective.statistics_of(
        MiniBatchInputs(
            log_probs=log_probs.double(),
            old_log_probs=mini_batch.old_log_probs[mask].double(),
            advantages=mini_batch.advantages[mask].double(),
            sequence_ids=mask.nonzero()[:, 0],
            draw_seeds=mini_batch.draw_seeds,
            groups=mini_batch.groups,
            sum=sum_over_ranks,
            gather=lambda values: gather_over_data_parallel(values, parallel),
        )
    )
