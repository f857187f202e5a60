"""What a step gives to one rank at a time: sequences, micro-batches, rows of logits."""

from __future__ import annotations

from dataclasses import dataclass

from apo_megatron.config.schema import RLConfig
from apo_megatron.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Workload:
    """The largest that a configuration allows: every sequence is of ``sequence_length``."""

    sequence_length: int  # tokens of prompt and response
    response_length: int  # trained tokens among them
    num_sequences: int  # of a step, over all ranks
    num_mini_batches: int
    sequences_per_micro_batch: int
    tokens_per_micro_batch: int  # shared by the context-parallel ranks
    trained_per_micro_batch: int  # rows of logits, of tokens_per_micro_batch

    @staticmethod
    def of(cfg: RLConfig, sequence_length: int | None = None) -> Workload:
        """``sequence_length``: default prompt and response at their longest.

        A packed micro-batch may be full of short prompts' responses: all its tokens count as trained.
        """
        response = cfg.rollout.max_new_tokens
        length = sequence_length or cfg.data.max_prompt_length + response
        response = min(response, length)
        budget = cfg.train.max_tokens_per_micro_batch
        if budget is None:
            sequences = cfg.train.micro_batch_size
            tokens, trained = sequences * length, sequences * response
        else:  # a sequence over the budget runs alone
            sequences = max(1, budget // length)
            tokens = trained = max(budget, length)
        return Workload(
            sequence_length=length,
            response_length=response,
            num_sequences=cfg.data.prompts_per_step * cfg.rollout.group_size,
            num_mini_batches=cfg.train.num_mini_batches,
            sequences_per_micro_batch=sequences,
            tokens_per_micro_batch=tokens,
            trained_per_micro_batch=trained,
        )

    def num_micro_batches(self, dims: ParallelDims) -> int:
        """Of one update, on each rank."""
        sequences = -(-self.num_sequences // (self.num_mini_batches * dims.data))
        return max(1, -(-sequences // self.sequences_per_micro_batch))
