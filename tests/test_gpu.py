"""The same code on a GPU with NCCL; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apo_megatron.diagnosis.differences import relative_differences
from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk
from tests.distributed import run_distributed
from tests.tiny_models import make_tiny_model
from tests.update_cases import APO, make_sequences, plain_update, updates

pytestmark = pytest.mark.gpu


def test_vocab_ops_on_the_gpu_equal_float64_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    vocab_size, width = 5000, 5120
    logits = torch.randn(64, width, generator=generator) * 4
    targets = torch.randint(0, vocab_size, (64,), generator=generator)
    shard = VocabShard(0, width, vocab_size)
    log_probs, ids = vocab_parallel_topk(logits.double(), 8, shard)
    support = ids.masked_fill(ids == targets.unsqueeze(1), -1)
    leaf = logits.double().requires_grad_()
    terms = vocab_parallel_policy_terms(leaf * 1.0, targets, support, shard)
    (terms.log_probs.sum() + 2 * terms.anchor_log_mass.sum() + 3 * terms.entropy.sum()).backward()
    assert leaf.grad is not None
    payload = {"logits": logits, "targets": targets, "ids": support, "vocab_size": vocab_size}
    found = run_distributed(1, "tests.workers.gpu:vocab_ops", payload, use_gpu=True)[0]
    assert found["backend"] == "nccl"
    assert torch.equal(found["values"][1], ids)
    for value, expected in zip(found["values"], [log_probs, ids, *terms, leaf.grad], strict=True):
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "num_columns", "dtype"),
    [
        (300, 151_936, 151_936, torch.float32),
        (300, 151_936, 151_643, torch.bfloat16),
        (300, 50_257, 50_257, torch.bfloat16),  # rows that begin at any address
        (14_400, 151_936, 151_643, torch.bfloat16),  # more than 2^31 logits
    ],
)
def test_kernels_equal_torch_on_the_gpu(rows: int, width: int, num_columns: int, dtype: torch.dtype) -> None:
    payload = {"rows": rows, "width": width, "num_columns": num_columns, "dtype": dtype, "num_compared": 64}
    found = run_distributed(1, "tests.workers.gpu:vocab_kernels", payload, use_gpu=True)[0]
    row_max, sum_exp, _, values, columns, search_max, search_sum, gradient = found["kernels"]
    assert torch.equal(row_max, search_max) and torch.equal(sum_exp, search_sum)
    assert torch.equal(values, found["torch"][3]) and torch.equal(columns, found["torch"][4])
    for value, expected in zip(found["kernels"][:-1], found["torch"][:-1], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4  # one bf16 step where the sum before rounding differs
    torch.testing.assert_close(gradient, found["torch"][-1], rtol=rtol, atol=1e-4)


def test_updates_on_the_gpu_equal_plain_torch(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "qwen2", num_layers=4)
    cases = [
        {"model_path": path, "layout": {}, "objective": APO, **how}
        for how in (
            {},
            {"max_tokens": 40},
            {"max_tokens": 40, "max_logits_mib": 0},
            {"max_tokens": 40, "dtype": "bfloat16"},  # TransformerEngine's attention, where it is there
        )
    ]
    *exact, rounded = updates(1, make_sequences(), cases, use_gpu=True)
    expected = plain_update(path, make_sequences(), APO)
    for found in exact:
        assert max(relative_differences(found, expected).values()) < 1e-4
    assert max(relative_differences(rounded, expected).values()) < 0.1
