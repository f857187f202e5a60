"""The same code on a GPU with NCCL; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apo_megatron.parallel.vocab import VocabShard, vocab_parallel_policy_terms, vocab_parallel_topk
from tests.distributed import run_distributed
from tests.plain_reference import run_plain
from tests.test_layout_invariance import (
    AGGREGATIONS,
    DEFAULTS,
    LOSSES,
    NUM_MINI_BATCHES,
    OPTIMIZER,
    SEED,
    make_sequences,
    relative_differences,
)
from tests.tiny_models import make_tiny_model

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


def test_updates_on_the_gpu_equal_plain_torch(tmp_path: Path) -> None:
    path = str(make_tiny_model(tmp_path, "qwen2", num_layers=4))
    objective = {**DEFAULTS, **LOSSES["apo_ratio"], **AGGREGATIONS["token-mean"]}
    payload = {
        "model_path": path,
        "sequences": make_sequences(),
        "optimizer": OPTIMIZER,
        "num_mini_batches": NUM_MINI_BATCHES,
        "seed": SEED,
        "cases": [{"layout": {}, "micro_batch_size": 2, "objective": objective}],
    }
    (found,) = run_distributed(1, "tests.workers.layout_invariance:run_cases", payload, use_gpu=True)[0]
    expected = run_plain(path, make_sequences(), objective, OPTIMIZER, NUM_MINI_BATCHES, SEED)
    assert max(relative_differences(found, expected).values()) < 1e-4
