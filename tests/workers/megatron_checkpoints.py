"""Loads converted checkpoints into models at several layouts, in our way and in Megatron's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.models.policy_model import PolicyModel
from apo_megatron.parallel.state import init_parallel
from apo_megatron.weights.load import load_hf_weights, load_megatron_weights, named_weights
from checkpoints_convert.logits import compare_logits


def load_everywhere(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per case the weights that differ from those loaded out of the Hugging Face checkpoint, by way."""
    results = []
    layout = None
    for case in payload["cases"]:
        if case["layout"] != layout:
            layout = case["layout"]
            parallel = init_parallel(ParallelConfig(**layout))
        hf_path, megatron_path = case["hf_path"], Path(case["megatron_path"])
        architecture = read_architecture(hf_path)
        cfg = ModelConfig(hf_path=hf_path, dtype="float32", make_vocab_size_divisible_by=8)
        chunks = build_policy_model(architecture, cfg, parallel)
        load_hf_weights(chunks, architecture, hf_path, parallel)
        expected = {name: tensor.clone() for name, tensor in named_weights(chunks)}
        num_rows = architecture.vocab_size

        _spoil(chunks)
        load_megatron_weights(chunks, architecture, megatron_path, parallel)
        ours = [name for name, tensor in named_weights(chunks) if not torch.equal(tensor, expected[name])]

        _spoil(chunks)
        _load_as_megatron_does(chunks, megatron_path)
        padded = chunks[0].vocab_size // parallel.dims.tensor
        start = parallel.tensor_rank * padded
        megatrons = [
            name
            for name, tensor in named_weights(chunks)
            if not torch.equal(
                _real(name, tensor, num_rows - start), _real(name, expected[name], num_rows - start)
            )
        ]
        comparison = compare_logits(hf_path, megatron_path, parallel, cfg)
        results.append(
            {
                "ours": ours,
                "megatrons": megatrons,
                "num_weights": len(expected),
                "difference": comparison.difference,
                "agrees": comparison.agrees,
            }
        )
    return results


@torch.no_grad()
def _spoil(chunks: list[PolicyModel]) -> None:
    for _, tensor in named_weights(chunks):
        tensor.fill_(7.0)


def _load_as_megatron_does(chunks: list[PolicyModel], folder: Path) -> None:
    """What any program on Megatron-Core would do, without a line of our own."""
    state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    # Converted checkpoints have no extra states (scales of FP8 layers), which Megatron asks every layer for.
    loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.IGNORE_ALL)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def _real(name: str, tensor: Tensor, num_rows: int) -> Tensor:
    """Without the rows that pad the vocabulary, which Megatron leaves as they were."""
    is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return tensor[: max(0, num_rows)] if is_vocabulary else tensor
