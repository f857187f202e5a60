"""From one rank's row statistics to the policy's terms, their gradient's coefficients, and the merged Top-K.

The collectives of the vocabulary are here. Everything is a few numbers a row: whoever makes the logits, and
in how many pieces, calls the same functions, so the results are the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apo_megatron.parallel._vocab_rows import Candidates, RowStatistics, exponents
from apo_megatron.parallel.vocab_shard import VocabShard

_LN_2 = math.log(2.0)


class PolicyTerms(NamedTuple):
    """What the objective reads of the policy; each [T] unless said otherwise, fp32 (float64 for float64
    logits), on every rank."""

    log_probs: Tensor  # log pi(target), <= 0
    anchor_log_mass: Tensor  # log P, P = sum of pi over the support ids, <= 0; -inf where there are none
    entropy: Tensor  # of pi, nats, >= 0
    extra_log_probs: Tensor  # [T, E], log pi of the extra ids, <= 0; -inf where absent


class ReferenceTerms(NamedTuple):
    """What is read of the reference; fp32 (float64 for float64 logits), on every rank."""

    topk_log_probs: Tensor  # [T, k], descending, <= 0; -inf beyond the vocabulary
    topk_ids: Tensor  # [T, k] int64; -1 beyond the vocabulary
    log_probs: Tensor  # [T], log pi(target), <= 0


class ChosenColumns(NamedTuple):
    """Where the C = K + E support and extra ids of each row lie on this rank, and in column 0 the target."""

    columns: Tensor  # [T, 1 + C] int64, local; 0 where it is on another rank or absent
    is_local: Tensor  # [T, 1 + C] bool
    is_absent: Tensor  # [T, C] bool, without the target: not in the set


class SoftmaxRows(NamedTuple):
    """What backward needs of each row; what is not bool is in the compute dtype."""

    row_max: Tensor  # [T], of all ranks, base 2 as in RowStatistics
    sum_exp: Tensor  # [T], of all ranks
    mean_exponent: Tensor  # [T], of s under pi
    is_empty: Tensor  # [T] bool: no support
    shares: Tensor  # [T, K], pi(k) / P; 0 where absent
    is_extra_absent: Tensor  # [T, E] bool


class GradientRows(NamedTuple):
    """The gradient of a row, as ``overwrite_with_gradient`` takes it."""

    exp_coeff: Tensor  # [T]
    weighted_coeff: Tensor | None  # [T]; None where no gradient of the entropy is wanted
    column_grads: Tensor  # [T, 1 + C]; 0 at columns of other ranks


def base_2_scale(temperature: float) -> float:
    """The ``scale`` of the row functions: logits * scale is log2 of the unnormalised probability."""
    return 1.0 / (_LN_2 * temperature)


def locate(targets: Tensor, ids: Tensor, shard: VocabShard) -> ChosenColumns:
    """targets [T], other ids [T, C]. Raises RuntimeError where a target is outside the vocabulary."""
    ids = torch.cat([targets.unsqueeze(1), ids], 1).to(torch.int64)
    is_token = (ids >= 0) & (ids < shard.vocab_size)
    torch._assert_async(is_token[:, 0].all(), "a target lies outside the vocabulary")
    is_local = is_token & (ids >= shard.start) & (ids < shard.end)
    return ChosenColumns((ids - shard.start).masked_fill_(~is_local, 0), is_local, ~is_token[:, 1:])


def rescaled_sums(statistics: RowStatistics, row_max: Tensor) -> tuple[Tensor, Tensor]:
    """sum_exp and sum_weighted relative to a ``row_max`` that is not below that of the statistics."""
    shift = statistics.row_max - row_max
    shrink = torch.exp2(shift)
    return shrink * statistics.sum_exp, shrink * (statistics.sum_weighted + shift * statistics.sum_exp)


def support_and_extra(support_ids: Tensor, extra_ids: Tensor | None) -> Tensor:
    """support_ids [T, K] and extra_ids [T, E] (None: E = 0) side by side, [T, K + E]."""
    return support_ids if extra_ids is None else torch.cat([support_ids, extra_ids], 1)


def policy_terms(
    statistics: RowStatistics,
    chosen: Tensor,
    is_absent: Tensor,
    num_support: int,
    shard: VocabShard,
    temperature: float,
) -> tuple[PolicyTerms, SoftmaxRows]:
    """The terms of the whole vocabulary: an all-reduce of the row maxima and one of sums and chosen logits.

    statistics are of this rank's columns; chosen [T, 1 + C] holds logits in compute dtype, 0 where the column
    is on another rank. The first ``num_support`` (K) of the C ids are the support.
    """
    row_max, sum_exp, sum_weighted = statistics
    if shard.world > 1:
        row_max = row_max.clone()
        dist.all_reduce(row_max, op=dist.ReduceOp.MAX, group=shard.group)
        packed = torch.cat([torch.stack(rescaled_sums(statistics, row_max), 1), chosen], 1)
        dist.all_reduce(packed, group=shard.group)
        sum_exp, sum_weighted, chosen = packed[:, 0], packed[:, 1], packed[:, 2:]

    log2_sum, mean_exponent = sum_exp.log2(), sum_weighted / sum_exp
    log_probs = log_probs_of(chosen, row_max, sum_exp, temperature)
    is_absent, is_extra_absent = is_absent[:, :num_support], is_absent[:, num_support:]
    is_empty = is_absent.all(1)
    target, support, extra = log_probs.tensor_split([1, 1 + num_support], 1)
    anchor_log_mass = support.masked_fill(is_absent, -math.inf).logsumexp(1).clamp_(max=0.0)
    # pi(k) / P is a softmax over the support alone, exact however small P is.
    shares = (chosen[:, 1 : 1 + num_support] / temperature).masked_fill_(is_absent, -math.inf).softmax(1)
    shares = shares.masked_fill_(is_absent, 0.0)  # an empty support gave NaN
    entropy = (log2_sum - mean_exponent).mul_(_LN_2).clamp_(min=0.0)
    extra_log_probs = extra.masked_fill(is_extra_absent, -math.inf)
    terms = PolicyTerms(target.squeeze(1).clone(), anchor_log_mass, entropy, extra_log_probs)
    return terms, SoftmaxRows(row_max, sum_exp, mean_exponent, is_empty, shares, is_extra_absent)


def log_probs_of(logits: Tensor, row_max: Tensor, sum_exp: Tensor, temperature: float) -> Tensor:
    """log pi of logits [T, n], given the statistics [T] of the whole rows; <= 0."""
    exponent = exponents(logits, row_max, base_2_scale(temperature))
    return exponent.sub_(sum_exp.log2().unsqueeze(1)).mul_(_LN_2).clamp_(max=0.0)


def gradient_rows(
    rows: SoftmaxRows,
    is_local: Tensor,
    grad_log_probs: Tensor | None,
    grad_anchor: Tensor | None,
    grad_entropy: Tensor | None,
    grad_extra: Tensor | None,
    temperature: float,
) -> GradientRows:
    """d/d logit_v of g_y log pi(y) + g_P log P + g_H H + sum_e g_e log pi(e), as coefficients of 2^s, of
    2^s * s, and at columns.

    (g_y (1[v = y] - pi_v) + g_P (1[v in S] pi_v / P - pi_v) - g_H pi_v (log pi_v + H)
     + sum_e g_e (1[v = e] - pi_v)) / temperature
    """
    zeros = torch.zeros_like(rows.row_max)
    grad_target = zeros if grad_log_probs is None else grad_log_probs
    grad_support = zeros if grad_anchor is None else grad_anchor.masked_fill(rows.is_empty, 0.0)
    per_exp = 1.0 / (temperature * rows.sum_exp)  # 2^s * per_exp = pi / temperature
    exp_coeff = -(grad_target + grad_support)
    weighted_coeff = None
    if grad_entropy is not None:  # log pi + H = ln 2 * (s - mean_exponent)
        exp_coeff += grad_entropy * rows.mean_exponent * _LN_2
        weighted_coeff = -grad_entropy * _LN_2 * per_exp
    grads = [grad_target.unsqueeze(1), grad_support.unsqueeze(1) * rows.shares]
    if grad_extra is None:
        grads.append(torch.zeros_like(rows.is_extra_absent, dtype=zeros.dtype))
    else:
        grads.append(grad_extra.masked_fill(rows.is_extra_absent, 0.0))
        exp_coeff -= grads[-1].sum(1)
    column_grads = torch.cat(grads, 1)
    column_grads = column_grads.div_(temperature).masked_fill_(~is_local, 0.0)
    return GradientRows(exp_coeff * per_exp, weighted_coeff, column_grads)


def topk_log_probs(
    candidates: Candidates, chosen: Tensor, shard: VocabShard, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best columns of the whole vocabulary and the chosen ones, in one all-gather.

    candidates are of this rank; chosen [T, C] as in policy_terms. Returns log-probs [T, k], ids [T, k] int64
    (-inf and -1 beyond the vocabulary) and log-probs [T, C] of the chosen.
    """
    values, columns, row_max, sum_exp = candidates
    ids = torch.where(columns < 0, columns, columns + shard.start)
    if shard.world > 1:
        values, ids, row_max, sum_exp, chosen = _merge_ranks(values, ids, row_max, sum_exp, chosen, shard)
    log_probs = log_probs_of(torch.cat([values, chosen], 1), row_max, sum_exp, temperature)
    return log_probs[:, : values.shape[1]], ids, log_probs[:, values.shape[1] :]


def _merge_ranks(
    values: Tensor, ids: Tensor, row_max: Tensor, sum_exp: Tensor, chosen: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k best of every rank's k best, and the statistics and chosen logits of the whole row."""
    num_rows, k = values.shape
    dtype = values.dtype
    bits = torch.int64 if dtype == torch.float64 else torch.int32  # floats travel as integers: ids stay exact
    floats = torch.cat([values, row_max.unsqueeze(1), sum_exp.unsqueeze(1), chosen], 1)
    packed = torch.cat([floats.view(bits), ids.to(bits)], 1)
    gathered = packed.new_empty((shard.world * num_rows, packed.shape[1]))
    dist.all_gather_into_tensor(gathered, packed, group=shard.group)
    gathered = gathered.unflatten(0, (shard.world, num_rows))

    num_floats = floats.shape[1]
    rank_values, rank_max, rank_sum, rank_chosen = (
        gathered[..., :num_floats].contiguous().view(dtype).split([k, 1, 1, chosen.shape[1]], -1)
    )
    row_max = rank_max.amax(0)
    sum_exp = (torch.exp2(rank_max - row_max) * rank_sum).sum(0)
    # Ranks ascend in id and each rank's equal values ascend in id.
    all_values = rank_values.transpose(0, 1).flatten(1)
    all_ids = gathered[..., num_floats:].transpose(0, 1).flatten(1)
    values, ids = first_best(all_values, all_ids, k)
    return values, ids.to(torch.int64), row_max.squeeze(1), sum_exp.squeeze(1), rank_chosen.sum(0)


def first_best(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values [T, n] and their ids; of equal values those that come first, in their order."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k])
