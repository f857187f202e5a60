"""vocab_parallel_policy_terms and vocab_parallel_topk against plain torch on the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apo_megatron.parallel.vocab import (
    PolicyTerms,
    VocabShard,
    vocab_parallel_policy_terms,
    vocab_parallel_reference_terms,
    vocab_parallel_topk,
)
from tests.distributed import run_distributed

NAN, INF = float("nan"), float("inf")


def reference_terms(
    logits: Tensor,
    targets: Tensor,
    support_ids: Tensor,
    temperature: float,
    extra_ids: Tensor | None = None,
) -> PolicyTerms:
    """The definitions, with autograd; logits hold no padding."""
    log_probs = (logits / temperature).log_softmax(1)
    extra_ids = targets.new_empty(len(targets), 0) if extra_ids is None else extra_ids
    support = log_probs.gather(1, support_ids.long().clamp(min=0)).masked_fill(support_ids < 0, -INF)
    is_empty = (support_ids < 0).all(1)
    # logsumexp has a NaN gradient where every entry is -inf: such rows get theirs from a detached constant.
    mass = torch.where(is_empty.unsqueeze(1), 0.0, support).logsumexp(1) if support.shape[1] else None
    anchor = log_probs.new_full((len(logits),), -INF) if mass is None else torch.where(is_empty, -INF, mass)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    sampled = log_probs.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    extra = log_probs.gather(1, extra_ids.clamp(min=0)).masked_fill(extra_ids < 0, -INF)
    return PolicyTerms(sampled, anchor, entropy, extra)


def reference_topk(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """A plain sort: value descending, id ascending; missing entries are -inf and -1."""
    values = logits.double() + 0.0
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    log_probs = (values / temperature).log_softmax(1).gather(1, order)
    missing = (len(logits), max(0, k - logits.shape[1]))
    ids = torch.cat([order, order.new_full(missing, -1)], 1)
    return torch.cat([log_probs, log_probs.new_full(missing, -INF)], 1), ids


def random_ids(num_rows: int, num_ids: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Distinct ids per row, a quarter of them replaced by -1."""
    ids = torch.rand(num_rows, vocab_size, generator=generator).argsort(1)[:, :num_ids]
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.25, -1).int()


def repeated_ids(targets: Tensor, support_ids: Tensor, vocab_size: int, seed: int) -> Tensor:
    """[T, 5]: the target, an id of the support, any id and the same again, any id or none."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(vocab_size, (2, len(targets), 1), generator=generator)
    other = other.masked_fill(torch.rand(other.shape, generator=generator) < 0.5, -1)
    return torch.cat([targets.unsqueeze(1), support_ids[:, -1:].long(), one, one, other], 1)


def make_case(
    num_rows: int = 7,
    vocab_size: int = 45,
    padded: int = 48,
    num_ids: int = 4,
    *,
    k: int = 8,
    temperature: float = 1.0,
    spread: float = 3.0,
    dtype: torch.dtype = torch.float64,
    padding: float = NAN,
    seed: int = 0,
) -> dict[str, Any]:
    """Row 0 has no support ids, row 1 has its target among them, row 2 does not; padding holds garbage.

    The gradients of what is absent are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, padded, generator=generator, dtype=torch.float64) * spread
    logits[:, vocab_size:] = padding
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    support_ids = random_ids(num_rows, num_ids, vocab_size, generator)
    grads = [torch.randn(num_rows, generator=generator, dtype=torch.float64) for _ in range(3)]
    if num_rows >= 3 and num_ids >= 1:
        support_ids[0] = -1
        grads[1][0] = NAN
        support_ids[1, -1], targets[1] = 5, 5
        support_ids[1, :-1] = -1
        targets[2] = next(i for i in range(vocab_size) if i not in support_ids[2].tolist())
    extra_ids = repeated_ids(targets, support_ids, vocab_size, seed)
    grad = torch.randn(extra_ids.shape, generator=generator, dtype=torch.float64)
    grads.append(grad.masked_fill(extra_ids < 0, NAN))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "extra_ids": extra_ids,
        "logits": logits.to(dtype),
        "vocab_size": vocab_size,
        "targets": targets,
        "support_ids": support_ids,
        "grads": [grad.to(wide) for grad in grads],
        "temperature": temperature,
        "k": k,
    }


def tie_case(vocab_size: int, padded: int, k: int, levels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Integer-valued logits with few levels, both zeros among them."""
    case = make_case(12, vocab_size, padded, 3, k=k, dtype=dtype, padding=INF, seed=vocab_size)
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(levels, (12, vocab_size), generator=generator).to(dtype) - (levels - 1)
    negative_zero = (values == 0) & (torch.rand(values.shape, generator=generator) < 0.5)
    case["logits"][:, :vocab_size] = torch.where(negative_zero, -0.0, values)
    return case


def underflow_case() -> dict[str, Any]:
    """Mass of the support from 1e-2 down to far below the smallest fp32 number."""
    case = make_case(6, 45, 48, 2, dtype=torch.float32, spread=1.0)
    ids = torch.tensor([[3, 40]]).expand(6, 2).int()
    case["logits"].scatter_add_(
        1, ids.long(), -torch.tensor([4.0, 40, 70, 100, 400, 2000]).unsqueeze(1).expand(6, 2)
    )
    case.update(support_ids=ids, targets=torch.tensor([3, 40, 3, 7, 3, 3]))
    case["grads"] = [grad.nan_to_num(1.0) for grad in case["grads"]]
    return case


CASES: dict[str, dict[str, Any]] = {
    "plain": make_case(),
    "cool": make_case(temperature=0.5, padding=INF, seed=1),
    "warm": make_case(temperature=2.0, padding=-INF, seed=2),
    "no padding": make_case(vocab_size=48, seed=3),
    "last rank all padding": make_case(vocab_size=30, k=40, padding=1e300, seed=4),
    "no support": make_case(num_ids=0, seed=5),
    "one support id": make_case(num_ids=1, seed=6, k=1),
    "no rows": make_case(num_rows=0, seed=7),
    "peaked": make_case(spread=60.0, seed=8),
    "fp32": make_case(40, 301, 304, dtype=torch.float32, padding=INF, seed=9),
    "bf16": make_case(40, 301, 304, dtype=torch.bfloat16, seed=10),
    "fp32 wide": make_case(9, 6001, 6004, 8, dtype=torch.float32, temperature=0.7, seed=11),
    "bf16 wide": make_case(9, 6001, 6004, 8, dtype=torch.bfloat16, temperature=0.7, seed=12),
    "underflow": underflow_case(),
    "ties": tie_case(45, 48, 8, 2, torch.float64),
    "ties fp32": tie_case(45, 48, 50, 3, torch.float32),
    "ties wide fp32": tie_case(6001, 6004, 16, 4, torch.float32),
    "ties wide bf16": tie_case(6001, 6004, 8, 500, torch.bfloat16),
    "all equal": tie_case(6001, 6004, 8, 1, torch.float32),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # bf16: the gradient is rounded


def finite_grads(case: dict[str, Any]) -> list[Tensor]:
    """The gradients of the case in float64, 0 for what is absent."""
    grads = [grad.double() for grad in case["grads"]]
    grads[1] = grads[1].masked_fill((case["support_ids"] < 0).all(1), 0.0)
    grads[3] = grads[3].masked_fill(case["extra_ids"] < 0, 0.0)
    return grads


def check_case(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """results: the ranks of one group, ascending, as tests.workers.vocab_ops gives them."""
    dtype, vocab_size = case["logits"].dtype, case["vocab_size"]
    tolerance = TOLERANCE[dtype]
    whole = case["logits"][:, :vocab_size].double().requires_grad_()
    ids = case["support_ids"], case["temperature"], case["extra_ids"]
    expected = reference_terms(whole, case["targets"], *ids)
    grads = finite_grads(case)
    usable = [(term, grad) for term, grad in zip(expected, grads, strict=True) if term.requires_grad]
    torch.autograd.backward([term for term, _ in usable], [grad for _, grad in usable])
    top_log_probs, top_ids = reference_topk(whole.detach(), case["k"], case["temperature"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for result in results:
        for name, term, value in zip(PolicyTerms._fields, expected, result["terms"], strict=True):
            assert value.dtype == wide
            torch.testing.assert_close(
                value.double(), term.detach(), rtol=3e-6, atol=tolerance / 10, msg=name
            )
        assert (result["terms"][0] <= 0).all() and (result["terms"][1] <= 0).all()
        assert (result["terms"][2] >= 0).all() and (result["terms"][3] <= 0).all()
        assert torch.equal(result["terms"][3].isneginf(), case["extra_ids"] < 0)
        assert torch.equal(result["top_ids"], top_ids)
        torch.testing.assert_close(result["top_log_probs"].double(), top_log_probs, rtol=3e-6, atol=3e-6)
        values, ids, log_probs = result["reference"]
        assert torch.equal(values, result["top_log_probs"]) and torch.equal(ids, top_ids)
        torch.testing.assert_close(log_probs, result["terms"][0], rtol=3e-6, atol=tolerance / 10)
    grad = torch.cat([result["grad"] for result in results], 1)
    assert grad.dtype == dtype
    assert (grad[:, vocab_size:] == 0).all()
    assert whole.grad is not None
    torch.testing.assert_close(grad[:, :vocab_size].double(), whole.grad, atol=tolerance, rtol=tolerance)


def run_alone(case: dict[str, Any]) -> dict[str, Any]:
    shard = VocabShard(0, case["logits"].shape[1], case["vocab_size"])
    logits = case["logits"].clone().requires_grad_()
    top_log_probs, top_ids = vocab_parallel_topk(logits, case["k"], shard, case["temperature"])
    reference = vocab_parallel_reference_terms(logits, case["targets"], case["k"], shard, case["temperature"])
    terms = vocab_parallel_policy_terms(
        logits, case["targets"], case["support_ids"], shard, case["temperature"], case["extra_ids"]
    )
    torch.autograd.backward(terms, case["grads"])
    assert torch.equal(reference.log_probs, terms.log_probs)  # ratio 1 at theta = reference
    return {
        "terms": terms,
        "grad": logits.grad,
        "top_log_probs": top_log_probs,
        "top_ids": top_ids,
        "reference": list(reference),
    }


@pytest.mark.parametrize("name", CASES)
def test_unsharded(name: str) -> None:
    check_case(CASES[name], [run_alone(CASES[name])])


def test_sharded() -> None:
    """Groups of 1, 2 and 4 ranks: the same numbers, identical Top-K ids, and 1 + 1 + 2 + 0 collectives."""
    sizes = (1, 2, 4)
    ranks = run_distributed(4, "tests.workers.vocab_ops:check", {"cases": CASES, "group_sizes": sizes})
    for size in sizes:
        for name, case in CASES.items():
            results = [rank[f"{size}/{name}"] for rank in ranks]
            for i in range(0, 4, size):
                check_case(case, results[i : i + size])
            expected = [0, 0, 0, 0] if size == 1 else [1, 1, 2, 0]
            assert all(result["collectives"] == expected for result in results), (size, name)
    for rank in ranks:
        assert rank["huge ids"].tolist() == [[2**31 - 1, 2**31 - 2, 2**31 - 3]]


def leaf_and_terms(**options: Any) -> tuple[Tensor, PolicyTerms]:
    case = make_case(**options)
    shard = VocabShard(0, case["logits"].shape[1], case["vocab_size"])
    logits = case["logits"].clone().requires_grad_()
    terms = vocab_parallel_policy_terms(
        logits, case["targets"], case["support_ids"], shard, extra_ids=case["extra_ids"]
    )
    return logits, terms


def plain_sum(terms: PolicyTerms, chosen: tuple[int, ...]) -> Tensor:
    """Of the chosen terms, without what is absent."""
    return torch.cat([terms[i].nan_to_num(neginf=0.0).flatten() for i in chosen]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_lies_in_the_storage_of_the_logits(dtype: torch.dtype) -> None:
    logits, terms = leaf_and_terms(dtype=dtype)
    (terms.log_probs.sum() + terms.entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3)])
def test_terms_without_a_gradient_contribute_nothing(chosen: tuple[int, ...]) -> None:
    case = make_case()
    logits, terms = leaf_and_terms()
    plain_sum(terms, chosen).backward()
    whole = case["logits"][:, :45].clone().requires_grad_()
    expected = reference_terms(whole, case["targets"], case["support_ids"], 1.0, case["extra_ids"])
    plain_sum(expected, chosen).backward()
    assert logits.grad is not None and whole.grad is not None
    torch.testing.assert_close(logits.grad[:, :45], whole.grad)


@pytest.mark.parametrize("incoming", [NAN, INF, -INF, 1.0])
def test_empty_support_has_no_gradient(incoming: float) -> None:
    logits, terms = leaf_and_terms()
    assert terms.anchor_log_mass[0] == -INF
    terms.anchor_log_mass.backward(torch.full_like(terms.anchor_log_mass, incoming))
    assert logits.grad is not None
    assert (logits.grad[0] == 0).all()


@pytest.mark.parametrize("incoming", [NAN, INF, -INF, 1.0])
def test_absent_extra_ids_have_no_gradient(incoming: float) -> None:
    case = make_case()
    logits, absent = case["logits"].clone().requires_grad_(), torch.full((7, 2), -1)
    shard = VocabShard(0, 48, 45)
    terms = vocab_parallel_policy_terms(logits, case["targets"], case["support_ids"], shard, extra_ids=absent)
    assert terms.extra_log_probs.isneginf().all()
    terms.extra_log_probs.backward(torch.full_like(terms.extra_log_probs, incoming))
    assert logits.grad is not None and (logits.grad == 0).all()


def test_the_other_terms_do_not_see_the_extra_ids() -> None:
    """To the bit: APO's numbers are the same whether somebody looks at other tokens or not."""
    case = CASES["fp32 wide"]
    shard, found = VocabShard(0, 6004, 6001), []
    for extra in (None, case["extra_ids"]):
        logits = case["logits"].clone().requires_grad_()
        terms = vocab_parallel_policy_terms(logits, case["targets"], case["support_ids"], shard, 0.7, extra)
        torch.autograd.backward(terms[:3], case["grads"][:3])
        assert logits.grad is not None
        found.append([*terms[:3], logits.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_log_prob_of_a_certain_token_is_not_positive() -> None:
    logits = torch.linspace(20.0, 60.0, 400).unsqueeze(1) * torch.tensor([[1.0, 0.0, 0.2]])
    ids = torch.zeros(400, 1, dtype=torch.int64)
    terms = vocab_parallel_policy_terms(logits, ids[:, 0], ids, VocabShard(0, 3, 3))
    assert (terms.log_probs <= 0).all() and (terms.log_probs > -1e-6).all()
    assert (terms.anchor_log_mass <= 0).all() and (terms.entropy >= 0).all()


def test_topk_and_policy_terms_agree_to_the_bit() -> None:
    """Anchor ratio 1 at theta = reference: both ops round alike."""
    case = CASES["fp32 wide"]
    shard = VocabShard(0, 6004, 6001)
    log_probs, ids = vocab_parallel_topk(case["logits"], 8, shard, 0.7)
    for slot in range(8):
        terms = vocab_parallel_policy_terms(case["logits"], ids[:, slot], ids, shard, 0.7, ids)
        assert torch.equal(terms.log_probs, log_probs[:, slot])
    assert torch.equal(terms.anchor_log_mass, log_probs.logsumexp(1))
    assert torch.equal(terms.extra_log_probs, log_probs)


def test_second_backward_is_refused() -> None:
    _, terms = leaf_and_terms()
    loss = terms.log_probs.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    logits, terms = leaf_and_terms()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(terms.log_probs.sum(), logits, create_graph=True)


def test_another_user_of_the_logits_is_found() -> None:
    """An operation that saved the logits and runs its backward after ours must not see the gradient."""
    case = make_case(padding=0.0)
    leaf = case["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    squares = (logits * logits).sum()
    terms = vocab_parallel_policy_terms(logits, case["targets"], case["support_ids"], VocabShard(0, 48, 45))
    terms.log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("target", [-1, 45, 47])
def test_target_outside_the_vocabulary(target: int) -> None:
    case = make_case()
    case["targets"][3] = target
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        vocab_parallel_policy_terms(
            case["logits"], case["targets"], case["support_ids"], VocabShard(0, 48, 45)
        )
