"""Hugging Face checkpoints with random weights, for benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apo_megatron.models.hf_config import read_architecture
from apo_megatron.weights.formats.hf_checkpoint import write_hf_checkpoint
from apo_megatron.weights.formats.safetensors_writer import TensorSpec
from apo_megatron.weights.table import build_table

# The shape of a small Qwen2, but for what the benchmarks choose.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def write_random_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Path:
    """Write ``folder / "model"``: config.json with QWEN2 and ``config``, and weights; no tokenizer."""
    config_folder = folder / "config"
    config_folder.mkdir(parents=True, exist_ok=True)
    torch_dtype = str(dtype).removeprefix("torch.")
    (config_folder / "config.json").write_text(json.dumps({**QWEN2, "torch_dtype": torch_dtype, **config}))
    specs = [
        TensorSpec(name, shape, dtype)
        for entry in build_table(read_architecture(config_folder)).entries()
        if entry.exported
        for name, shape in zip(entry.hf_names, entry.layout.hf_shapes, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)

    def random_tensors() -> Iterator[tuple[str, Tensor]]:
        for spec in specs:
            values = torch.empty(spec.shape, dtype=spec.dtype)
            yield spec.name, values.uniform_(-0.05, 0.05, generator=generator)

    return write_hf_checkpoint(folder / "model", specs, random_tensors(), config_folder)
