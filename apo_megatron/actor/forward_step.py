"""What Megatron's schedules call for every micro-batch: forward, then a loss or per-token results.

The vocabulary is looked at for the trained response tokens only ([T], T = loss_mask.sum()): the model
projects no other row, and where the logits would be too large not even those (``LMHeadInput``). Per-token
results come back as [T] tensors, in the order of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from apo_megatron.actor.micro_batches import MicroBatches
from apo_megatron.actor.model_inputs import ModelInput
from apo_megatron.health import activity
from apo_megatron.models.policy_model import LMHeadInput
from apo_megatron.objectives.interface import LossInputs, TokenMetric
from apo_megatron.objectives.objective import Objective
from apo_megatron.parallel.lm_head import lm_head_policy_terms, lm_head_topk
from apo_megatron.parallel.vocab import (
    PolicyTerms,
    ReferenceTerms,
    VocabShard,
    vocab_parallel_policy_terms,
    vocab_parallel_reference_terms,
)
from apo_megatron.types import TrainedTokens

ModelOutput = Tensor | LMHeadInput  # logits [T, V/p], or what they are made of
TokenResults = dict[str, Tensor]
TokenFunction = Callable[[ModelOutput, TrainedTokens], TokenResults]  # -> named [T, ...]
Progress = Callable[[int, int], None]  # so many more sequences and trained tokens went through the model


@dataclass(frozen=True)
class TokenTerms:
    """Turns the model's output into what the passes and the loss need of each token; logits are consumed."""

    shard: VocabShard
    temperature: float
    # The fused LM head sums its weight's gradient into Megatron's fp32 buffer; False: autograd hands it on.
    gradient_in_place: bool = True

    def log_probs(self, output: ModelOutput, tokens: TrainedTokens) -> TokenResults:
        """log pi(y) of the trained tokens."""
        no_support = tokens.targets.new_empty(len(tokens.targets), 0)
        return {"log_probs": self._policy_terms(output, tokens.targets, no_support).log_probs}

    def reference(
        self, output: ModelOutput, tokens: TrainedTokens, topk: int, exclude_sampled: bool
    ) -> TokenResults:
        """What a token needs of the reference: log-prob, Top-K support and its log mass.

        The support ids are -1 where the sampled token was excluded or the vocabulary is smaller than K;
        ``coverage`` is the reference mass of the whole Top-K (telemetry).
        """
        if not topk:
            return self.log_probs(output, tokens)
        support_log_probs, ids, log_probs = self._reference_terms(output, tokens.targets, topk)
        coverage = support_log_probs.exp().sum(-1)
        if exclude_sampled:
            is_sampled = ids == tokens.targets.unsqueeze(-1)
            ids = ids.masked_fill(is_sampled, -1)
            support_log_probs = support_log_probs.masked_fill(is_sampled, float("-inf"))
        return {
            "coverage": coverage,
            "support_ids": ids.to(torch.int32),
            "anchor_log_mass": torch.logsumexp(support_log_probs, dim=-1),
            "log_probs": log_probs,
        }

    def loss(
        self, objective: Objective, output: ModelOutput, tokens: TrainedTokens
    ) -> tuple[Tensor, dict[str, TokenMetric]]:
        """The weighted loss of the micro-batch (a sum of shares of the mini-batch's loss) and its metrics."""
        targets, support = tokens.targets, tokens.reference_support_ids
        support_ids = targets.new_empty(len(targets), 0) if support is None else support.long()
        terms = self._policy_terms(output, targets, support_ids)
        # An id of -1 stands for the sampled token that was excluded from its own support.
        in_support = ((support_ids < 0) | (support_ids == targets.unsqueeze(-1))).any(dim=-1)
        old_log_probs = tokens.old_log_probs
        inputs = LossInputs(
            log_probs=terms.log_probs,
            old_log_probs=terms.log_probs.detach() if old_log_probs is None else old_log_probs,
            advantages=tokens.advantages,
            entropy=terms.entropy if "entropy_grad" in objective.needs else terms.entropy.detach(),
            sequence_ids=tokens.sequence_ids,
            anchor_log_mass=None if support is None else terms.anchor_log_mass,
            reference_anchor_log_mass=tokens.reference_anchor_log_mass,
            reference_log_probs=tokens.reference_log_probs,
            rollout_log_probs=tokens.rollout_log_probs,
            sampled_in_support=None if support is None else in_support,
            target_advantages=tokens.target_advantages,
        )
        return objective(inputs, tokens.loss_weights)

    def _policy_terms(self, output: ModelOutput, targets: Tensor, support_ids: Tensor) -> PolicyTerms:
        if isinstance(output, Tensor):
            return vocab_parallel_policy_terms(output, targets, support_ids, self.shard, self.temperature)
        in_place = self.gradient_in_place and torch.is_grad_enabled()
        return lm_head_policy_terms(
            output.hidden,
            output.weight,
            targets,
            support_ids,
            self.shard,
            self.temperature,
            main_grad=output.weight.main_grad if in_place else None,  # type: ignore[attr-defined]
        )

    def _reference_terms(self, output: ModelOutput, targets: Tensor, k: int) -> ReferenceTerms:
        if isinstance(output, Tensor):
            return vocab_parallel_reference_terms(output, targets, k, self.shard, self.temperature)
        return lm_head_topk(output.hidden, output.weight, targets, k, self.shard, self.temperature)


def run_forward(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: MicroBatches,
    function: TokenFunction,
    progress: Progress | None = None,
) -> TokenResults:
    """``function`` of every trained token without gradients: {name: [T of all, ...]}, in the order of the
    sequences and the same on all context-parallel ranks; {} off the last stage."""

    def collect(model_input: ModelInput, output: ModelOutput, non_loss_data: bool) -> TokenResults:
        assert non_loss_data
        return function(output, model_input.trained)

    with torch.no_grad():
        results = _run_schedule(model_chunks, micro_batches, collect, progress, forward_only=True)
    if not results:
        return {}
    return {name: micro_batches.in_order(torch.cat([r[name] for r in results])) for name in results[0]}


def run_forward_backward(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: MicroBatches,
    loss: Callable[[ModelOutput, TrainedTokens], tuple[Tensor, dict[str, TokenMetric]]],
    consume_metrics: Callable[[dict[str, TokenMetric]], None],
    progress: Progress | None = None,
) -> None:
    """Accumulate the gradients of all micro-batches into the DDP buffers, reduced over the ranks that have
    other tokens."""

    def loss_and_metrics(model_input: ModelInput, output: ModelOutput) -> tuple[Tensor, Tensor, None]:
        value, metrics = loss(output, model_input.trained)
        consume_metrics(metrics)
        # Three results: Megatron then applies no scale of its own (calculate_per_token_loss).
        return value, torch.ones((), dtype=torch.int, device=value.device), None

    _run_schedule(model_chunks, micro_batches, loss_and_metrics, progress, forward_only=False)


def _run_schedule(
    model_chunks: Sequence[torch.nn.Module],
    micro_batches: MicroBatches,
    at_the_end: Callable[..., Any],
    progress: Progress | None,
    forward_only: bool,
) -> list[Any]:
    inputs = micro_batches.inputs

    def forward_step(data: Iterator[ModelInput], model: torch.nn.Module) -> tuple[Any, Any]:
        if model is model_chunks[0]:
            activity.current.next_micro_batch()
        model_input = next(data).to(micro_batches.parallel.device)
        # Padding is on the right of its sequence, under a causal mask: no attention mask is needed.
        output = model(
            model_input.tokens,
            model_input.positions,
            None,
            loss_mask=model_input.loss_mask,
            packed_seq_params=model_input.packed,
        )
        if progress is not None and model is model_chunks[-1]:
            progress(model_input.num_sequences, model_input.num_trained)
        return output, partial(at_the_end, model_input)

    iterators = [iter(inputs) for _ in model_chunks]
    with activity.current.micro_batches(len(inputs)):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(model_chunks),
            num_microbatches=len(inputs),
            seq_length=micro_batches.length,
            micro_batch_size=len(inputs[0].tokens),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    return list(results)
