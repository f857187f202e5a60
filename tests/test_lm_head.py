"""The fused LM head against plain torch in float64 and against the ops on whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from apo_megatron.parallel.lm_head import TileSize, lm_head_policy_terms, lm_head_topk
from apo_megatron.parallel.vocab import (
    PolicyTerms,
    VocabShard,
    vocab_parallel_policy_terms,
    vocab_parallel_topk,
)
from tests.distributed import run_distributed
from tests.lm_head_cases import CASES, head_case, run_case
from tests.test_vocab_ops import TOLERANCE, finite_grads, plain_sum, reference_terms, reference_topk

SMALL_TILE = TileSize(3, 5)


def check_case(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """results: the ranks of one group, ascending."""
    dtype, vocab_size = case["weight"].dtype, case["vocab_size"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = case["hidden"].to(torch.float64, copy=True).requires_grad_()
    weight = case["weight"][:vocab_size].to(torch.float64, copy=True).requires_grad_()
    logits = hidden @ weight.t()
    ids = case["support_ids"], case["temperature"], case["extra_ids"]
    expected = reference_terms(logits, case["targets"], *ids)
    grads = finite_grads(case)
    usable = [(term, grad) for term, grad in zip(expected, grads, strict=True) if term.requires_grad]
    torch.autograd.backward([term for term, _ in usable], [grad for _, grad in usable])
    top_log_probs, top_ids = reference_topk(logits.detach(), case["k"], case["temperature"])
    for result in results:
        for term, value in zip(expected, result["terms"], strict=True):
            assert value.dtype == wide
            check_values(value, term.detach(), dtype)
        values, ids, log_probs = result["reference"]
        assert torch.equal(ids, top_ids)
        check_values(values, top_log_probs, dtype)
        check_values(log_probs, result["terms"][0], dtype)
        check_gradient(result["grad_hidden"], hidden.grad, dtype)
        assert torch.equal(result["grad_hidden"], results[0]["grad_hidden"])
    grad_weight = torch.cat([result["grad_weight"] for result in results])
    assert (grad_weight[vocab_size:] == 0).all()
    check_gradient(grad_weight[:vocab_size], weight.grad, dtype)


def check_values(values: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    atol, rtol = (1e-12, 1e-12) if dtype == torch.float64 else (5e-6, 3e-6)
    torch.testing.assert_close(values.double(), expected.double(), atol=atol, rtol=rtol)


def check_gradient(grad: Tensor, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Relative to the largest entry: each is a sum whose parts are rounded."""
    assert expected is not None and grad.dtype == dtype
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=0.0, atol=TOLERANCE[dtype] * scale)


def whole_shard(case: dict[str, Any]) -> VocabShard:
    return VocabShard(0, len(case["weight"]), case["vocab_size"])


def leaves(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_()


def terms_of(case: dict[str, Any], hidden: Tensor, weight: Tensor, **options: Any) -> PolicyTerms:
    return lm_head_policy_terms(
        hidden,
        weight,
        case["targets"],
        case["support_ids"],
        whole_shard(case),
        extra_ids=case["extra_ids"],
        tile=SMALL_TILE,
        **options,
    )


@pytest.mark.parametrize("name", CASES)
def test_unsharded(name: str) -> None:
    result = run_case(CASES[name], whole_shard(CASES[name]))
    check_case(CASES[name], [result])
    assert torch.equal(result["reference"][2], result["terms"][0])  # ratio 1 at theta = reference


def test_sharded() -> None:
    """Groups of 1, 2 and 4 ranks: the same numbers, and 1 + 2 + 1 collectives."""
    sizes = (1, 2, 4)
    ranks = run_distributed(4, "tests.workers.lm_head:check", {"cases": CASES, "group_sizes": sizes})
    for size in sizes:
        for name, case in CASES.items():
            results = [rank[f"{size}/{name}"] for rank in ranks]
            for i in range(0, 4, size):
                check_case(case, results[i : i + size])
            expected = [0, 0, 0] if size == 1 else [1, 2, 1]
            assert all(result["collectives"] == expected for result in results), (size, name)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_ops_on_whole_logits(name: str) -> None:
    case = {**CASES[name], "weight": CASES[name]["weight"].clone()}
    case["weight"][case["vocab_size"] :] = 0.0  # a plain product would carry garbage into the gradients
    shard, temperature = whole_shard(case), case["temperature"]
    hidden, weight = leaves(case)
    logits = hidden @ weight.t()
    topk = vocab_parallel_topk(logits, case["k"], shard, temperature)
    ids = case["support_ids"], shard, temperature, case["extra_ids"]
    terms = vocab_parallel_policy_terms(logits, case["targets"], *ids)
    torch.autograd.backward(terms, case["grads"])
    found = run_case(case, shard)
    dtype = case["hidden"].dtype
    for value, expected in zip(found["terms"], terms, strict=True):
        check_values(value, expected.detach(), dtype)
    check_values(found["reference"][0], topk[0], dtype)
    assert torch.equal(found["reference"][1], topk[1])
    for name, leaf in (("grad_hidden", hidden), ("grad_weight", weight)):
        assert leaf.grad is not None
        check_gradient(found[name], leaf.grad.double(), dtype)


@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (3,), (0, 1)])
def test_terms_without_a_gradient_contribute_nothing(chosen: tuple[int, ...]) -> None:
    case = head_case(padding=0.0)
    hidden, weight = leaves(case)
    terms = terms_of(case, hidden, weight)
    plain_sum(terms, chosen).backward()
    plain_hidden, plain_weight = leaves(case)
    logits = plain_hidden @ plain_weight[: case["vocab_size"]].t()
    expected = reference_terms(logits, case["targets"], case["support_ids"], 1.0, case["extra_ids"])
    plain_sum(expected, chosen).backward()
    torch.testing.assert_close(hidden.grad, plain_hidden.grad)
    torch.testing.assert_close(weight.grad, plain_weight.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_main_grad_takes_the_gradient_of_the_weight(dtype: torch.dtype) -> None:
    """Added to what is there, unrounded; what a tied embedding adds still goes through autograd."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = head_case(dtype=dtype, levels=3, padding=0.0)
    case["grads"] = [grad.nan_to_num() for grad in case["grads"]]
    hidden, weight = leaves(case)
    torch.autograd.backward(terms_of(case, hidden, weight), case["grads"])
    main_grad = torch.full(weight.shape, 0.5, dtype=wide)
    other_hidden, other_weight = leaves(case)
    embedded = other_weight[torch.tensor([1, 1, 4])]
    terms = terms_of(case, other_hidden, other_weight, main_grad=main_grad)
    torch.autograd.backward([embedded.sum(), *terms], [None, *case["grads"]])
    assert weight.grad is not None and other_weight.grad is not None
    torch.testing.assert_close((main_grad - 0.5).to(dtype), weight.grad, atol=1e-6, rtol=2**-8)
    if dtype == torch.bfloat16:
        assert not torch.equal(main_grad, main_grad.to(dtype).to(wide))
    assert torch.equal(other_weight.grad.sum(1).nonzero().squeeze(1), torch.tensor([1, 4]))
    assert torch.equal(hidden.grad, other_hidden.grad)  # type: ignore[arg-type]


def test_second_backward_gives_the_same_gradient() -> None:
    case = head_case()
    hidden, weight = leaves(case)
    loss = terms_of(case, hidden, weight).log_probs.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused() -> None:
    case = head_case()
    hidden, weight = leaves(case)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(terms_of(case, hidden, weight).log_probs.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("target", [-1, 45, 47])
def test_target_outside_the_vocabulary(target: int) -> None:
    case = head_case()
    case["targets"][3] = target
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        terms_of(case, case["hidden"], case["weight"])
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        lm_head_topk(case["hidden"], case["weight"], case["targets"], 2, whole_shard(case))


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at a time in ``function``, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    current = peak = 0
    for event in events:
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def peak_and_logit_bytes(num_rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a reference pass, a forward and a backward with small tiles on a wide vocabulary."""
    case = head_case(num_rows, vocab_size=30_000, padded=30_000, num_ids=1, dtype=dtype)
    targets, ids, shard, tile = case["targets"], case["support_ids"], whole_shard(case), TileSize(64, 2048)
    hidden, weight = leaves(case)

    def forward_and_backward() -> None:
        lm_head_topk(hidden, weight, targets, 8, shard, tile=tile)
        terms = lm_head_policy_terms(hidden, weight, targets, ids, shard, tile=tile)
        torch.autograd.backward(terms[:3], case["grads"][:3])

    return peak_bytes(forward_and_backward), num_rows * 30_000 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_tile(dtype: torch.dtype) -> None:
    """Far under the logits, and it does not grow with the rows."""
    few, few_logits = peak_and_logit_bytes(128, dtype)
    many, many_logits = peak_and_logit_bytes(256, dtype)
    print(f"peak {few} and {many} bytes, logits {few_logits} and {many_logits}")
    assert many < many_logits / 4
    assert many - few < (many_logits - few_logits) / 50
