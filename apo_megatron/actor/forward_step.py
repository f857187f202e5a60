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
from apo_megatron.objectives.sequences import WholeSequences
from apo_megatron.parallel.lm_head import lm_head_policy_terms, lm_head_topk
from apo_megatron.parallel.vocab import (
    PolicyTerms,
    ReferenceTerms,
    VocabShard,
    vocab_parallel_policy_terms,
    vocab_parallel_reference_terms,
    vocab_parallel_topk,
)
from apo_megatron.types import OUTSIDE_SUPPORT, TrainedTokens

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
    # In place, over the context-parallel ranks, which have a part of a micro-batch's tokens each.
    sum_over_context: Callable[[Tensor], Tensor] | None = None

    def log_probs(self, output: ModelOutput, tokens: TrainedTokens) -> TokenResults:
        """log pi(y) of the trained tokens."""
        no_support = tokens.targets.new_empty(len(tokens.targets), 0)
        return {"log_probs": self._policy_terms(output, tokens.targets, no_support).log_probs}

    def reference(
        self,
        output: ModelOutput,
        tokens: TrainedTokens,
        topk: int,
        exclude_sampled: bool,
        support_mass: float | None = None,
        keep_log_probs: bool = False,
    ) -> TokenResults:
        """What a token needs of the reference: log-prob, Top-K support and its log mass.

        With ``support_mass`` the support M is the smallest prefix of the Top-K with at least that mass. The
        support ids are -1 where the sampled token was excluded from M or the vocabulary is smaller than K,
        ``OUTSIDE_SUPPORT`` behind that prefix; ``coverage`` is the reference mass of M (telemetry). With
        ``keep_log_probs`` also the log-probs of the whole Top-K, [T, K].
        """
        if not topk:
            return self.log_probs(output, tokens)
        support_log_probs, ids, log_probs = self._reference_terms(output, tokens.targets, topk)
        whole = {"support_log_probs": support_log_probs} if keep_log_probs else {}
        if support_mass is not None:
            is_cut = _behind_mass(support_log_probs, support_mass)
            ids = ids.masked_fill(is_cut, OUTSIDE_SUPPORT)
            support_log_probs = support_log_probs.masked_fill(is_cut, float("-inf"))
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
            **whole,
        }

    def loss(
        self, objective: Objective, output: ModelOutput, tokens: TrainedTokens
    ) -> tuple[Tensor, dict[str, TokenMetric]]:
        """The weighted loss of the micro-batch (a sum of shares of the mini-batch's loss) and its metrics."""
        targets, support = tokens.targets, tokens.reference_support_ids
        support_ids = targets.new_empty(len(targets), 0) if support is None else support.long()
        reference_ids = _whole_reference_topk(tokens)
        policy_ids = self._topk(output, targets, objective.policy_topk)
        terms = self._policy_terms(output, targets, support_ids, torch.cat([reference_ids, policy_ids], 1))
        at_reference, at_own = terms.extra_log_probs.split(
            [reference_ids.shape[1], policy_ids.shape[1]], dim=1
        )
        # An id of -1 stands for the sampled token that was excluded from its own support.
        in_support = ((support_ids == -1) | (support_ids == targets.unsqueeze(-1))).any(dim=-1)
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
            reference_topk_log_probs=tokens.reference_support_log_probs,
            log_probs_at_reference_topk=at_reference if at_reference.shape[1] else None,
            policy_topk_log_probs=at_own if at_own.shape[1] else None,
            sampled_is_likeliest=policy_ids[:, 0] == targets if policy_ids.shape[1] else None,
            solve_rates=tokens.solve_rates,
            sequences=self._whole_sequences(tokens) if "whole_sequences" in objective.needs else None,
            statistics=objective.named_statistics(tokens.loss_statistics),
            target_advantages=tokens.target_advantages,
        )
        return objective(inputs, tokens.loss_weights)

    def _whole_sequences(self, tokens: TrainedTokens) -> WholeSequences:
        split, sum_over_context = tokens.split, self.sum_over_context
        if split is None:
            return WholeSequences.all_here(tokens.sequence_ids)
        assert sum_over_context is not None

        def gather(values: Tensor) -> Tensor:
            everywhere = values.new_zeros(len(split.sequence_ids))
            everywhere[split.places] = values
            return sum_over_context(everywhere)

        return WholeSequences(split.sequence_ids, gather, lambda values: values[split.places])

    def _policy_terms(
        self, output: ModelOutput, targets: Tensor, support_ids: Tensor, extra_ids: Tensor | None = None
    ) -> PolicyTerms:
        if isinstance(output, Tensor):
            return vocab_parallel_policy_terms(
                output, targets, support_ids, self.shard, self.temperature, extra_ids
            )
        in_place = self.gradient_in_place and torch.is_grad_enabled()
        return lm_head_policy_terms(
            output.hidden,
            output.weight,
            targets,
            support_ids,
            self.shard,
            self.temperature,
            extra_ids,
            main_grad=output.weight.main_grad if in_place else None,  # type: ignore[attr-defined]
        )

    def _topk(self, output: ModelOutput, targets: Tensor, k: int) -> Tensor:
        """Ids [T, k] of the likeliest tokens, without a gradient and before the logits are consumed."""
        if k == 0:
            return targets.new_empty(len(targets), 0)
        if isinstance(output, Tensor):
            return vocab_parallel_topk(output, k, self.shard, self.temperature)[1]
        return self._reference_terms(output, targets, k).topk_ids

    def _reference_terms(self, output: ModelOutput, targets: Tensor, k: int) -> ReferenceTerms:
        if isinstance(output, Tensor):
            return vocab_parallel_reference_terms(output, targets, k, self.shard, self.temperature)
        return lm_head_topk(output.hidden, output.weight, targets, k, self.shard, self.temperature)


def _whole_reference_topk(tokens: TrainedTokens) -> Tensor:
    """The ids [T, K] of the reference's Top-K with the sampled token in its place, where log-probs of it
    were kept; else [T, 0]."""
    ids, log_probs, targets = tokens.reference_support_ids, tokens.reference_support_log_probs, tokens.targets
    if ids is None or log_probs is None:
        return targets.new_empty(len(targets), 0)
    is_excluded = (ids == -1) & ~log_probs.isneginf()  # -inf: beyond the vocabulary
    return torch.where(is_excluded, targets.unsqueeze(1), ids.long())


def _behind_mass(log_probs: Tensor, mass: float) -> Tensor:
    """[T, K] bool: which of ``log_probs`` [T, K], in descending order, come after ``mass`` has been reached.

    Never the first. Padding (-inf) does, where there is any: by then the vocabulary has come to its end.
    """
    probs = log_probs.double().exp()
    return (probs.cumsum(-1) - probs >= mass) | log_probs.isneginf()


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
