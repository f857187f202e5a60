"""Log-probabilities over a vocabulary that is sharded over ranks.

Three quantities of the policy in two collectives forward and none backward, and the Top-K of the reference in
one collective. Formulas: "Anchored Policy Optimization", arXiv 2602.05717; P is the policy's mass on the
anchor support S, every distribution is softmax(logits / temperature). No second buffer of the size of the
logits exists at any time: forward and backward work through a few rows at a time, and backward writes the
gradient into the storage of the logits.

Shapes: T token rows, V padded vocabulary columns, p ranks, K support tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.parallel._vocab_rows import (
    best_columns,
    exponents,
    overwrite_with_gradient,
    row_statistics,
)

_LN_2 = math.log(2.0)


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, end) of the padded vocabulary, held by this rank.

    Columns at and above ``vocab_size`` are padding: whatever they hold, they count as -inf, are never in a
    Top-K and get a zero gradient. ``group`` holds the ranks of all columns, in the order of the columns; None
    means that nothing is sharded.
    """

    start: int
    end: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of_rank(
        rank: int, world: int, padded_vocab_size: int, vocab_size: int, group: dist.ProcessGroup | None
    ) -> VocabShard:
        """The ``rank``-th of ``world`` equal shards, as Megatron lays them out."""
        assert padded_vocab_size % world == 0, f"{padded_vocab_size} columns do not divide over {world} ranks"
        width = padded_vocab_size // world
        return VocabShard(rank * width, (rank + 1) * width, vocab_size, group)

    @property
    def width(self) -> int:
        return self.end - self.start

    @property
    def num_real_columns(self) -> int:
        """Columns of this shard that are tokens; they come first."""
        return min(max(self.vocab_size - self.start, 0), self.width)

    @property
    def world(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def check(self, logits: Tensor, temperature: float) -> None:
        assert logits.dim() == 2 and logits.shape[1] == self.width, (
            f"logits {tuple(logits.shape)} are not [T, {self.width}] of {self}"
        )
        assert temperature > 0, f"temperature must be positive, not {temperature}"


class PolicyTerms(NamedTuple):
    """What the objective reads of the policy; each [T] fp32 (float64 for float64 logits), on every rank."""

    log_probs: Tensor  # log pi(target), <= 0
    anchor_log_mass: Tensor  # log P, P = sum of pi over the support ids, <= 0; -inf where there are none
    entropy: Tensor  # of pi, nats, >= 0


def vocab_parallel_policy_terms(
    logits: Tensor, targets: Tensor, support_ids: Tensor, shard: VocabShard, temperature: float = 1.0
) -> PolicyTerms:
    """Log-prob of the targets, log-mass of the support and entropy, of softmax(logits / temperature).

    logits [T, V/p] fp32, bf16 or float64, finite outside padding; targets [T] integer in [0, vocab_size);
    support_ids [T, K] integer, distinct within a row, -1 = not in the set (K may be 0). Targets and ids are
    the same on every rank of the group. T may be 0, then on every rank of the group.

    Differentiable in all three terms with respect to logits. A row without support ids has -inf log-mass and
    no gradient through it, whatever gradient comes in. **Backward overwrites the logits with their
    gradient**, so nothing may read them after it: torch raises where another operation saved them for its own
    backward, and a second or a double backward raises RuntimeError. Where rounding would push a log-prob
    above 0 or the entropy below 0 (by some 1e-7) the value is 0.

    Raises RuntimeError where a target is outside the vocabulary (on a GPU: asynchronously).
    """
    shard.check(logits, temperature)
    return PolicyTerms(*_PolicyTerms.apply(logits, targets, support_ids, shard, temperature))


class _PolicyTerms(torch.autograd.Function):
    """Forward: all-reduce of the row maxima, then one packed all-reduce of sums and chosen logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, support_ids: Tensor, shard: VocabShard, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = 1.0 / (_LN_2 * temperature)
        # Column 0 of everything [T, 1 + K] below is the target, the others are the support.
        ids = torch.cat([targets.unsqueeze(1), support_ids], 1).to(torch.int64)
        is_token = (ids >= 0) & (ids < shard.vocab_size)
        torch._assert_async(is_token[:, 0].all(), "a target lies outside the vocabulary")
        is_local = is_token & (ids >= shard.start) & (ids < shard.end)
        columns = (ids - shard.start).masked_fill_(~is_local, 0)

        statistics = row_statistics(logits[:, : shard.num_real_columns], scale)
        row_max, sum_exp, sum_weighted = statistics
        chosen = logits.gather(1, columns).to(row_max.dtype).masked_fill_(~is_local, 0.0)
        if shard.world > 1:
            row_max = row_max.clone()
            dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=shard.group)
            shift = statistics.row_max - row_max
            shrink = torch.exp2(shift)
            sums = torch.stack([shrink * sum_exp, shrink * (sum_weighted + shift * sum_exp)], 1)
            packed = torch.cat([sums, chosen], 1)
            dist.all_reduce(packed, group=shard.group)
            sum_exp, sum_weighted, chosen = packed[:, 0], packed[:, 1], packed[:, 2:]

        log2_sum, mean_exponent = sum_exp.log2(), sum_weighted / sum_exp
        log_probs = exponents(chosen, row_max, scale).sub_(log2_sum.unsqueeze(1)).mul_(_LN_2).clamp_(max=0.0)
        is_absent = ~is_token[:, 1:]
        is_empty = is_absent.all(1)
        anchor_log_mass = log_probs[:, 1:].masked_fill(is_absent, -math.inf).logsumexp(1).clamp_(max=0.0)
        # pi(k) / P is a softmax over the support alone, exact however small P is.
        shares = (chosen[:, 1:] / temperature).masked_fill_(is_absent, -math.inf).softmax(1)
        shares = shares.masked_fill_(is_absent, 0.0)  # an empty support gave NaN

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, row_max, sum_exp, mean_exponent, is_empty, shares, is_local, columns)
        ctx.num_real_columns, ctx.temperature, ctx.scale = shard.num_real_columns, temperature, scale
        ctx.is_spent = False
        entropy = (log2_sum - mean_exponent).mul_(_LN_2).clamp_(min=0.0)
        return log_probs[:, 0].clone(), anchor_log_mass, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: Tensor | None, grad_anchor: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        """d/d logit_v of g_y log pi(y) + g_P log P + g_H H, written over the logits; no collective.

        (g_y (1[v = y] - pi_v) + g_P (1[v in S] pi_v / P - pi_v) - g_H pi_v (log pi_v + H)) / temperature
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_parallel_policy_terms has no double backward: call backward without create_graph=True"
            )
        if ctx.is_spent:
            raise RuntimeError(
                "second backward through vocab_parallel_policy_terms: the first one has overwritten the "
                "logits with their gradient; compute the logits again instead of keeping the graph"
            )
        logits, row_max, sum_exp, mean_exponent, is_empty, shares, is_local, columns = ctx.saved_tensors
        ctx.is_spent = True
        zeros = torch.zeros_like(row_max)
        grad_target = zeros if grad_log_probs is None else grad_log_probs
        grad_support = zeros if grad_anchor is None else grad_anchor.masked_fill(is_empty, 0.0)
        per_exp = 1.0 / (ctx.temperature * sum_exp)  # 2^s * per_exp = pi / temperature
        exp_coeff = -(grad_target + grad_support)
        weighted_coeff = None
        if grad_entropy is not None:  # log pi + H = ln 2 * (s - mean_exponent)
            exp_coeff += grad_entropy * mean_exponent * _LN_2
            weighted_coeff = -grad_entropy * _LN_2 * per_exp
        column_grads = torch.cat([grad_target.unsqueeze(1), grad_support.unsqueeze(1) * shares], 1)
        column_grads = column_grads.div_(ctx.temperature).masked_fill_(~is_local, 0.0)

        # Shares storage and version with the logits, so torch finds another user of the saved logits.
        grad = logits.detach()
        grad[:, ctx.num_real_columns :].zero_()
        if ctx.num_real_columns > 0:
            overwrite_with_gradient(
                grad[:, : ctx.num_real_columns],
                ctx.scale,
                row_max,
                exp_coeff * per_exp,
                weighted_coeff,
                columns,
                column_grads,
            )
        return grad, None, None, None, None


@torch.no_grad()
def vocab_parallel_topk(
    logits: Tensor, k: int, shard: VocabShard, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The k most probable tokens of softmax(logits / temperature), in one all-gather; no gradients.

    logits [T, V/p] fp32, bf16 or float64, finite outside padding. Returns log_probs [T, k] fp32 (float64 for
    float64 logits), <= 0, and ids [T, k] int64. Order: logit descending, then id ascending, so the ids are
    the same for every p, bit for bit, ties included. Entries beyond the vocabulary: log-prob -inf, id -1.
    """
    shard.check(logits, temperature)
    assert k >= 1, f"k must be positive, not {k}"
    scale = 1.0 / (_LN_2 * temperature)
    values, columns, row_max, sum_exp = best_columns(logits[:, : shard.num_real_columns], k, scale)
    ids = torch.where(columns < 0, columns, columns + shard.start)
    if shard.world > 1:
        values, ids, row_max, sum_exp = _merge_candidates(values, ids, row_max, sum_exp, shard)
    log_probs = exponents(values, row_max, scale).sub_(sum_exp.log2().unsqueeze(1)).mul_(_LN_2)
    return log_probs.clamp_(max=0.0), ids


def _merge_candidates(
    values: Tensor, ids: Tensor, row_max: Tensor, sum_exp: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k best of every rank's k best, and the statistics of the whole row; arguments are of one rank."""
    num_rows, k = values.shape
    dtype = values.dtype
    bits = torch.int64 if dtype == torch.float64 else torch.int32  # floats travel as integers: ids stay exact
    floats = torch.cat([values, row_max.unsqueeze(1), sum_exp.unsqueeze(1)], 1)
    packed = torch.cat([floats.view(bits), ids.to(bits)], 1)
    gathered = packed.new_empty((shard.world * num_rows, packed.shape[1]))
    dist.all_gather_into_tensor(gathered, packed, group=shard.group)
    gathered = gathered.unflatten(0, (shard.world, num_rows))

    rank_values, rank_max, rank_sum = gathered[..., : k + 2].contiguous().view(dtype).split([k, 1, 1], -1)
    row_max = rank_max.amax(0)
    sum_exp = (torch.exp2(rank_max - row_max) * rank_sum).sum(0)
    # Ranks ascend in id and each rank's equal values ascend in id, so a stable sort keeps the promised order.
    all_values = rank_values.transpose(0, 1).flatten(1)
    all_ids = gathered[..., k + 2 :].transpose(0, 1).flatten(1)
    values, order = all_values.sort(dim=1, descending=True, stable=True)
    ids = all_ids.gather(1, order[:, :k]).to(torch.int64)
    return values[:, :k], ids, row_max.squeeze(1), sum_exp.squeeze(1)
