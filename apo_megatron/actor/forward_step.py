"""What Megatron's schedules call for every micro-batch: forward, then a loss or per-token results.

The logits exist for the trained response tokens only ([T, V/p], T = loss_mask.sum()): the model projects
no other row. Per-token results come back as [T] tensors in row-major order of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from apo_megatron.objectives.interface import LossInputs, TokenMetric
from apo_megatron.objectives.objective import Objective
from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk
from apo_megatron.types import MicroBatch

TokenResults = dict[str, Tensor]
TokenFunction = Callable[[Tensor, MicroBatch], TokenResults]  # logits [T, V/p] -> named [T, ...]
Progress = Callable[[int, int], None]  # so many more sequences and trained tokens went through the model


@dataclass(frozen=True)
class TokenTerms:
    """Turns logits into what the passes and the loss need of each token; consumes the logits it is given."""

    shard: VocabShard
    temperature: float

    def log_probs(self, logits: Tensor, batch: MicroBatch) -> TokenResults:
        """log pi(y) of the trained tokens."""
        targets = batch.targets[batch.loss_mask]
        terms = vocab_parallel_policy_terms(
            logits, targets, targets.new_empty(len(targets), 0), self.shard, self.temperature
        )
        return {"log_probs": terms.log_probs}

    def reference(self, logits: Tensor, batch: MicroBatch, topk: int, exclude_sampled: bool) -> TokenResults:
        """What a token needs of the reference: log-prob, Top-K support and its log mass.

        The support ids are -1 where the sampled token was excluded or the vocabulary is smaller than K;
        ``coverage`` is the reference mass of the whole Top-K (telemetry).
        """
        targets = batch.targets[batch.loss_mask]
        results: TokenResults = {}
        if topk:
            support_log_probs, ids = vocab_parallel_topk(logits, topk, self.shard, self.temperature)
            results["coverage"] = support_log_probs.exp().sum(-1)
            if exclude_sampled:
                is_sampled = ids == targets.unsqueeze(-1)
                ids = ids.masked_fill(is_sampled, -1)
                support_log_probs = support_log_probs.masked_fill(is_sampled, float("-inf"))
            results["support_ids"] = ids.to(torch.int32)
            results["anchor_log_mass"] = torch.logsumexp(support_log_probs, dim=-1)
        return {**results, **self.log_probs(logits, batch)}

    def loss(
        self, objective: Objective, logits: Tensor, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, TokenMetric]]:
        """The weighted loss of the micro-batch (a sum of shares of the mini-batch's loss) and its metrics."""
        mask = batch.loss_mask
        targets = batch.targets[mask]
        support = batch.reference_support_ids
        support_ids = targets.new_empty(len(targets), 0) if support is None else support[mask].long()
        terms = vocab_parallel_policy_terms(logits, targets, support_ids, self.shard, self.temperature)
        # An id of -1 stands for the sampled token that was excluded from its own support.
        in_support = ((support_ids < 0) | (support_ids == targets.unsqueeze(-1))).any(dim=-1)
        old_log_probs = batch.old_log_probs
        inputs = LossInputs(
            log_probs=terms.log_probs,
            old_log_probs=terms.log_probs.detach() if old_log_probs is None else old_log_probs[mask],
            advantages=batch.advantages[mask],
            entropy=terms.entropy if "entropy_grad" in objective.needs else terms.entropy.detach(),
            sequence_ids=torch.nonzero(mask)[:, 0],
            anchor_log_mass=None if support is None else terms.anchor_log_mass,
            reference_anchor_log_mass=_masked(batch.reference_anchor_log_mass, mask),
            reference_log_probs=_masked(batch.reference_log_probs, mask),
            rollout_log_probs=_masked(batch.rollout_log_probs, mask),
            sampled_in_support=None if support is None else in_support,
        )
        return objective(inputs, batch.loss_weights[mask])


def _masked(values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else values[mask]


def _num_sequences_and_tokens(batch: MicroBatch) -> tuple[int, int]:
    tokens = batch.loss_mask.sum(dim=1)
    return int((tokens > 0).sum()), int(tokens.sum())


def run_forward(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    function: TokenFunction,
    progress: Progress | None = None,
) -> TokenResults:
    """``function`` of every micro-batch without gradients: {name: [T of all, ...]}; {} off the last stage."""

    def collect(batch: MicroBatch, logits: Tensor, non_loss_data: bool) -> TokenResults:
        assert non_loss_data
        return function(logits, batch)

    with torch.no_grad():
        results = _run_schedule(model_chunks, micro_batches, collect, progress, forward_only=True)
    return {name: torch.cat([r[name] for r in results]) for name in results[0]} if results else {}


def run_forward_backward(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[Tensor, MicroBatch], tuple[Tensor, dict[str, TokenMetric]]],
    consume_metrics: Callable[[dict[str, TokenMetric]], None],
    progress: Progress | None = None,
) -> None:
    """Accumulate the gradients of all micro-batches into the DDP buffers, reduced over data parallel."""

    def loss_and_metrics(batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor, None]:
        value, metrics = loss(logits, batch)
        consume_metrics(metrics)
        # Three results: Megatron then applies no scale of its own (calculate_per_token_loss).
        return value, torch.ones((), dtype=torch.int, device=value.device), None

    _run_schedule(model_chunks, micro_batches, loss_and_metrics, progress, forward_only=False)


def _run_schedule(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    at_the_end: Callable[..., Any],
    progress: Progress | None,
    forward_only: bool,
) -> list[Any]:
    # Counted before the first forward: on a GPU, reading a count later would wait for all work so far.
    counts = iter([_num_sequences_and_tokens(batch) for batch in micro_batches] if progress else [])

    def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(data)
        positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        # Right padding under a causal mask: no attention mask is needed.
        output = model(batch.tokens, positions, None, loss_mask=batch.loss_mask)
        if progress is not None and model is model_chunks[-1]:
            progress(*next(counts))
        return output, partial(at_the_end, batch)

    iterators = [iter(micro_batches) for _ in model_chunks]
    num_rows, length = micro_batches[0].tokens.shape
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model_chunks),
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=num_rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    return list(results)
