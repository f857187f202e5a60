"""The same tokens through transformers and through the Megatron model: how far are the logits apart?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from apo_megatron.actor.forward_step import ModelOutput, run_forward
from apo_megatron.actor.micro_batches import MicroBatchSize, split_into_micro_batches
from apo_megatron.config import ModelConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.transformer_config import TORCH_DTYPES
from apo_megatron.parallel.collectives import all_gather_objects, broadcast_from_main
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.parallel.vocab import VocabShard
from apo_megatron.types import PaddedSequences, TrainedTokens
from apo_megatron.weights.load import load_megatron_weights

PROMPT_LENGTHS = (16, 5, 11, 1)
# Of the largest logit. Rounding differs because sums are taken in another order, nothing else; wrong weights
# are off by a multiple of the bound. Tiny models measure up to 5e-7 and 1.2e-2.
RELATIVE_BOUND = {"float32": 2e-5, "bfloat16": 5e-2}


@dataclass(frozen=True)
class LogitsComparison:
    """Over all tokens of all prompts, and the whole vocabulary."""

    difference: float  # largest
    largest: float  # logit of transformers, by magnitude
    relative_bound: float

    @property
    def bound(self) -> float:
        return self.relative_bound * max(1.0, self.largest)

    @property
    def agrees(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def compare_logits(
    hf_path: str | Path, megatron_path: str | Path, parallel: ParallelContext, cfg: ModelConfig
) -> LogitsComparison:
    """Load ``hf_path`` in transformers on the main rank, then ``megatron_path`` in Megatron. Collective."""
    architecture = read_architecture(cfg.hf_path)
    prompts = make_prompts(architecture.vocab_size)
    expected = broadcast_from_main(
        _transformers_logits(hf_path, prompts, cfg) if parallel.is_main else torch.empty(0), parallel
    ).to(parallel.device)
    chunks = build_policy_model(architecture, cfg, parallel)
    load_megatron_weights(chunks, architecture, megatron_path, parallel)
    shard = VocabShard.of_rank(
        parallel.tensor_rank,
        parallel.dims.tensor,
        chunks[0].vocab_size,
        architecture.vocab_size,
        parallel.tensor_group,
    )
    start, end = shard.start, min(shard.end, architecture.vocab_size)

    def difference(logits: ModelOutput, _tokens: TrainedTokens) -> dict[str, Tensor]:
        assert isinstance(logits, Tensor) and parallel.dims.context == 1, "a few short prompts"
        columns = max(0, end - start)  # a rank may have nothing but padding
        # All prompts are in the first micro-batch; those that a schedule adds have no tokens.
        gap = (logits[:, :columns].float() - expected[: len(logits), start : start + columns]).abs()
        return {"difference": gap.amax(1) if columns else gap.new_zeros(len(gap))}

    sequences = _as_sequences(prompts)
    size = MicroBatchSize(num_sequences=sequences.num_sequences)
    found = run_forward(chunks, split_into_micro_batches(sequences, size, parallel), difference)
    mine = float(found["difference"].max()) if found else 0.0
    gaps = all_gather_objects(mine, parallel)
    worst = float("nan") if any(gap != gap for gap in gaps) else max(gaps)
    return LogitsComparison(worst, float(expected.abs().max()), RELATIVE_BOUND[cfg.dtype])


def make_prompts(vocab_size: int) -> list[np.ndarray]:
    """The same token ids every time, of unequal lengths."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab_size, length) for length in PROMPT_LENGTHS]


@torch.no_grad()
def _transformers_logits(hf_path: str | Path, prompts: list[np.ndarray], cfg: ModelConfig) -> Tensor:
    """[tokens of all prompts, V] fp32 on the CPU."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf_path, dtype=TORCH_DTYPES[cfg.dtype], use_safetensors=True)
    rows = [model.eval()(torch.from_numpy(prompt)[None]).logits[0].float() for prompt in prompts]
    return torch.cat(rows)


def _as_sequences(prompts: list[np.ndarray]) -> PaddedSequences:
    shape = (len(prompts), max(PROMPT_LENGTHS))
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.from_numpy(prompt)
        mask[row, : len(prompt)] = True
    zeros = torch.zeros(shape)
    return PaddedSequences(tokens, torch.zeros_like(tokens), mask, advantages=zeros, loss_weights=zeros)
