"""What ``benchmark_vocab_ops`` compares: operations on logits, and on what logits are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apo_megatron.parallel.lm_head import lm_head_policy_terms, lm_head_topk
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk
from tools.measurement import Operation, Tensors


@dataclass(frozen=True)
class Case:
    """Sizes and arguments of all operations; T rows, V/p columns on this rank."""

    num_rows: int
    hidden_size: int
    k: int
    dtype: torch.dtype
    shard: VocabShard
    targets: Tensor  # [T]
    support_ids: Tensor  # [T, K]
    parallel: ParallelContext

    @staticmethod
    def make(
        num_rows: int,
        vocab_size: int,
        hidden_size: int,
        k: int,
        dtype: torch.dtype,
        parallel: ParallelContext,
    ) -> Case:
        """Random targets, and K other ids that are far from each other."""
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(vocab_size, (num_rows,), generator=generator)
        support_ids = (targets.unsqueeze(1) + 1 + torch.arange(k) * (vocab_size // (k + 1))) % vocab_size
        shard = VocabShard.of_rank(
            parallel.tensor_rank, parallel.dims.tensor, vocab_size, vocab_size, parallel.tensor_group
        )
        targets, support_ids = targets.to(parallel.device), support_ids.to(parallel.device)
        return Case(num_rows, hidden_size, k, dtype, shard, targets, support_ids, parallel)

    @property
    def logit_bytes(self) -> int:
        """Of this rank."""
        return self.num_rows * self.shard.width * self.dtype.itemsize

    def random(self, *shape: int, scale: float) -> Tensor:
        """Gaussian, in the dtype of the case."""
        return torch.empty(shape, dtype=self.dtype, device=self.parallel.device).normal_(0, scale)


def logit_operations(case: Case) -> list[Operation]:
    """Operations on logits that are there. Plain torch sees one rank's columns only: none at p > 1."""
    # These import Megatron, which on a CPU must come after init_parallel has installed the adapter.
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    targets, k, shard = case.targets, case.k, case.shard
    original = case.random(case.num_rows, shard.width, scale=3.0)
    logits = original.clone()

    def on_logits(
        name: str, function: Callable[[Tensor], Any], is_yardstick: bool = False, is_compiled: bool = False
    ) -> Operation:
        def forward() -> Tensors:
            outputs = function(logits.detach().requires_grad_())
            return (outputs,) if isinstance(outputs, Tensor) else outputs

        return Operation(
            name,
            forward,
            prepare=lambda: logits.copy_(original),
            is_yardstick=is_yardstick,
            is_compiled=is_compiled,
        )

    def policy_terms(leaf: Tensor) -> Tensors:
        return vocab_parallel_policy_terms(leaf, targets, case.support_ids, shard)

    def megatron_fused(leaf: Tensor) -> Tensor:
        group = case.parallel.tensor_group
        return fused_vocab_parallel_cross_entropy(leaf.unsqueeze(1), targets.unsqueeze(1), group)

    def without_gradient(function: Callable[[Tensor], object]) -> Callable[[Tensor], Tensors]:
        def call(leaf: Tensor) -> Tensors:
            function(leaf.detach())
            return ()

        return call

    chosen = [
        on_logits("policy_terms", lambda leaf: policy_terms(leaf)[:2], is_yardstick=True),
        on_logits("policy_terms, gradient of the entropy too", policy_terms),
        on_logits(
            "Megatron cross-entropy (log-prob only)",
            lambda leaf: vocab_parallel_cross_entropy(leaf.unsqueeze(1), targets.unsqueeze(1)),
        ),
    ]
    if case.parallel.dims.tensor == 1:
        chosen.append(on_logits("plain torch, same outputs as policy_terms", partial(plain_terms, case=case)))
    if shutil.which("c++") is not None:  # torch.compile needs one
        chosen.append(
            on_logits("Megatron fused cross-entropy (log-prob only)", megatron_fused, is_compiled=True)
        )
    chosen += [
        on_logits(
            "topk, with log-probs",
            without_gradient(lambda leaf: vocab_parallel_topk(leaf, k, shard)),
            is_yardstick=True,
        ),
        on_logits(
            "torch.topk on the shard (no merge, no log-probs)", without_gradient(lambda leaf: leaf.topk(k, 1))
        ),
    ]
    if case.parallel.dims.tensor == 1:
        chosen.append(on_logits("torch.topk + logsumexp", without_gradient(lambda leaf: plain_topk(leaf, k))))
    return chosen


def plain_terms(logits: Tensor, case: Case) -> Tensors:
    """Log-prob and anchor log-mass with a gradient, the entropy without, in plain torch."""
    log_probs = logits.float().log_softmax(1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(1)
    del entropy  # reported, not trained on
    chosen = log_probs.gather(1, case.targets.unsqueeze(1)).squeeze(1)
    return chosen, log_probs.gather(1, case.support_ids).logsumexp(1)


def plain_topk(logits: Tensor, k: int) -> Tensor:
    """The k largest log-probs in plain torch."""
    return logits.topk(k, 1).values.float() - logits.float().logsumexp(1, keepdim=True)


class LMHead:
    """Hidden states and weight that are leaves, and what can be computed of them.

    A projection of several ranks leaves each with its part of the gradient of the hidden states: Megatron's
    layer sums them in the dtype of the parameters, and so does this one.
    """

    def __init__(self, case: Case) -> None:
        # It imports Megatron, which on a CPU must come after init_parallel has installed the adapter.
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        self.case = case
        width, hidden_size = case.shard.width, case.hidden_size
        self.hidden = case.random(case.num_rows, hidden_size, scale=1.0).requires_grad_()
        self.weight = case.random(width, hidden_size, scale=3.0 / hidden_size**0.5).requires_grad_()
        self._shared = copy_to_tensor_model_parallel_region

    def logits(self) -> Tensor:
        return F.linear(self._shared(self.hidden), self.weight)

    def fused(self, main_grad: Tensor | None = None) -> Tensors:
        case = self.case
        return lm_head_policy_terms(
            self.hidden, self.weight, case.targets, case.support_ids, case.shard, main_grad=main_grad
        )[:2]

    def unfused(self) -> Tensors:
        case = self.case
        return vocab_parallel_policy_terms(self.logits(), case.targets, case.support_ids, case.shard)[:2]

    @torch.no_grad()
    def fused_reference(self) -> Tensors:
        case = self.case
        lm_head_topk(self.hidden, self.weight, case.targets, case.k, case.shard)
        return ()

    @torch.no_grad()
    def unfused_reference(self) -> Tensors:
        case, logits = self.case, self.logits()
        vocab_parallel_topk(logits, case.k, case.shard)
        vocab_parallel_policy_terms(logits, case.targets, case.support_ids[:, :0], case.shard)
        return ()

    def operation(self, name: str, function: Callable[[], Tensors]) -> Operation:
        leaves = (self.hidden, self.weight)

        def forget_gradients() -> None:
            for leaf in leaves:
                leaf.grad = None

        return Operation(name, function, prepare=forget_gradients, leaves=leaves)


def head_operations(case: Case) -> list[Operation]:
    """Operations on hidden states and the output layer's weight, and the matrix products they consist of."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    head = LMHead(case)
    products = MatrixProducts(head.hidden.detach(), head.weight.detach())
    main_grad = torch.zeros_like(head.weight, dtype=torch.float32)
    targets = case.targets.unsqueeze(1)
    chosen = [
        Operation(
            "bare matrix products (1 forward, 3 backward)",
            products.forward,
            products.backward,
            is_yardstick=True,
        ),
        head.operation("lm_head_policy_terms, gradient in main_grad", partial(head.fused, main_grad)),
        head.operation("lm_head_policy_terms", head.fused),
        head.operation("projection + policy_terms", head.unfused),
        head.operation(
            "projection + Megatron cross-entropy (log-prob only)",
            lambda: (vocab_parallel_cross_entropy(head.logits().unsqueeze(1), targets),),
        ),
    ]
    if case.parallel.dims.tensor == 1:
        chosen.append(head.operation("projection + plain torch", lambda: plain_terms(head.logits(), case)))
    return [
        *chosen,
        Operation("bare matrix product", lambda: products.forward()[:0], is_yardstick=True),
        head.operation("lm_head_topk", head.fused_reference),
        head.operation("projection + topk + policy_terms", head.unfused_reference),
    ]


class MatrixProducts:
    """Projection, recomputation and both gradients, whole and into buffers that are there: the limit."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._weight = hidden, weight
        self._logits = hidden.new_zeros(len(hidden), len(weight))
        self._grads = torch.zeros_like(hidden), torch.zeros_like(weight)

    def forward(self) -> Tensors:
        return (torch.mm(self._hidden, self._weight.t(), out=self._logits),)

    def backward(self, _outputs: Tensors) -> None:
        (logits,) = self.forward()
        torch.mm(logits, self._weight, out=self._grads[0])
        torch.mm(logits.t(), self._hidden, out=self._grads[1])
