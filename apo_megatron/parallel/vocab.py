"""Log-probabilities over a vocabulary that is sharded over ranks.

The quantities of the policy in two collectives forward and none backward, and the Top-K of the reference in
one collective. Formulas: "Anchored Policy Optimization", arXiv 2602.05717; P is the policy's mass on the
anchor support S, every distribution is softmax(logits / temperature). No second buffer of the size of the
logits exists at any time: forward and backward work through a few rows at a time (on a GPU: in kernels that
read each logit once), and backward writes the gradient into the storage of the logits.

Shapes: T token rows, V padded vocabulary columns, p ranks, K support tokens, E extra tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apo_megatron.parallel._vocab_rows import Candidates
from apo_megatron.parallel._vocab_rows_by_device import row_functions
from apo_megatron.parallel._vocab_terms import (
    PolicyTerms,
    ReferenceTerms,
    SoftmaxRows,
    base_2_scale,
    gradient_rows,
    locate,
    policy_terms,
    support_and_extra,
    topk_log_probs,
)
from apo_megatron.parallel.vocab_shard import VocabShard


def vocab_parallel_policy_terms(
    logits: Tensor,
    targets: Tensor,
    support_ids: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    extra_ids: Tensor | None = None,
) -> PolicyTerms:
    """Log-prob of the targets, log-mass of the support, entropy and log-probs of extra tokens, of
    softmax(logits / temperature).

    logits [T, V/p] fp32, bf16 or float64, finite outside padding; targets [T] integer in [0, vocab_size);
    support_ids [T, K] integer, distinct within a row, -1 = not in the set (K may be 0); extra_ids [T, E]
    integer, -1 = absent, may repeat each other, the targets and the support (None: E = 0, which costs
    nothing). Targets and ids are the same on every rank of the group. T may be 0, then on every rank.

    Differentiable in all terms with respect to logits. A row without support ids has -inf log-mass and an
    absent id -inf log-prob, and no gradient through them, whatever gradient comes in. **Backward overwrites
    the logits with their gradient**, so nothing may read them after it: torch raises where another operation
    saved them for its own backward, and a second or a double backward raises RuntimeError. Where rounding
    would push a log-prob above 0 or the entropy below 0 (by some 1e-7) the value is 0.

    Raises RuntimeError where a target is outside the vocabulary (on a GPU: asynchronously).
    """
    shard.check(logits, temperature)
    ids = support_and_extra(support_ids, extra_ids)
    return PolicyTerms(*_PolicyTerms.apply(logits, targets, ids, support_ids.shape[1], shard, temperature))


class _PolicyTerms(torch.autograd.Function):
    """Forward: all-reduce of the row maxima, then one packed all-reduce of sums and chosen logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ids: Tensor,
        num_support: int,
        shard: VocabShard,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns, is_local, is_absent = locate(targets, ids, shard)
        real = logits[:, : shard.num_real_columns]
        statistics = row_functions(real).row_statistics(real, base_2_scale(temperature))
        chosen = logits.gather(1, columns).to(statistics.row_max.dtype).masked_fill_(~is_local, 0.0)
        terms, rows = policy_terms(statistics, chosen, is_absent, num_support, shard, temperature)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, is_local, columns, *rows)
        ctx.num_real_columns, ctx.temperature, ctx.is_spent = shard.num_real_columns, temperature, False
        return terms

    @staticmethod
    def backward(
        ctx: Any,
        grad_log_probs: Tensor | None,
        grad_anchor: Tensor | None,
        grad_entropy: Tensor | None,
        grad_extra: Tensor | None,
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """The gradient of the logits, written over them; no collective."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_parallel_policy_terms has no double backward: call backward without create_graph=True"
            )
        if ctx.is_spent:
            raise RuntimeError(
                "second backward through vocab_parallel_policy_terms: the first one has overwritten the "
                "logits with their gradient; compute the logits again instead of keeping the graph"
            )
        logits, is_local, columns, *saved = ctx.saved_tensors
        ctx.is_spent = True
        rows = SoftmaxRows(*saved)
        exp_coeff, weighted_coeff, column_grads = gradient_rows(
            rows, is_local, grad_log_probs, grad_anchor, grad_entropy, grad_extra, ctx.temperature
        )
        # Shares storage and version with the logits, so torch finds another user of the saved logits.
        grad = logits.detach()
        grad[:, ctx.num_real_columns :].zero_()
        if ctx.num_real_columns > 0:
            real = grad[:, : ctx.num_real_columns]
            row_functions(real).overwrite_with_gradient(
                real,
                base_2_scale(ctx.temperature),
                rows.row_max,
                exp_coeff,
                weighted_coeff,
                columns,
                column_grads,
            )
        return grad, None, None, None, None, None


@torch.no_grad()
def vocab_parallel_topk(
    logits: Tensor, k: int, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of softmax(logits / temperature), in one all-gather; no gradients.

    logits [T, V/p] fp32, bf16 or float64, finite outside padding. Returns log_probs [T, k] fp32 (float64 for
    float64 logits), <= 0, and ids [T, k] int64. Order: logit descending, then id ascending, so the ids are
    the same for every p, bit for bit, ties included. Entries beyond the vocabulary: log-prob -inf, id -1.
    """
    candidates = _best_columns(logits, k, shard, temperature)
    none_chosen = candidates.values[:, :0]
    log_probs, ids, _ = topk_log_probs(candidates, none_chosen, shard, temperature)
    return log_probs, ids


@torch.no_grad()
def vocab_parallel_reference_terms(
    logits: Tensor, targets: Tensor, k: int, shard: VocabShard, temperature: float = 1.0
) -> ReferenceTerms:
    """``vocab_parallel_topk`` and the log-probs of ``targets`` [T] in one pass over the logits; no gradients.

    On one rank the log-probs equal those of ``vocab_parallel_policy_terms`` to the bit. Raises RuntimeError
    where a target is outside the vocabulary (on a GPU: asynchronously).
    """
    candidates = _best_columns(logits, k, shard, temperature)
    columns, is_local, _ = locate(targets, targets.new_empty(len(targets), 0), shard)
    chosen = logits.gather(1, columns).to(candidates.row_max.dtype).masked_fill_(~is_local, 0.0)
    log_probs, ids, target_log_probs = topk_log_probs(candidates, chosen, shard, temperature)
    return ReferenceTerms(log_probs, ids, target_log_probs.squeeze(1))


def _best_columns(logits: Tensor, k: int, shard: VocabShard, temperature: float) -> Candidates:
    shard.check(logits, temperature)
    assert k >= 1, f"k must be positive, not {k}"
    real = logits[:, : shard.num_real_columns]
    return row_functions(real).best_columns(real, k, base_2_scale(temperature))
