"""The model and the sequences of the self-test: random, the same everywhere, written in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from apo_megatron.data.collate import TrainingSequence

VOCAB_SIZE, NUM_SEQUENCES = 107, 13  # both odd: vocabulary and data shards are ragged
_HIDDEN, _HEADS, _KEY_HEADS, _FEED_FORWARD, _NUM_LAYERS = 64, 4, 2, 96, 4
_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": _HIDDEN,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KEY_HEADS,
    "intermediate_size": _FEED_FORWARD,
    "num_hidden_layers": _NUM_LAYERS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}


def write_tiny_model(folder: Path) -> None:
    """A Qwen2 model of 4 layers: config.json and fp32 weights. ``folder`` exists."""
    generator = torch.Generator().manual_seed(0)
    key_size = _HIDDEN // _HEADS * _KEY_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, _HIDDEN),
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (VOCAB_SIZE, _HIDDEN),
    }
    for layer in range(_NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (_HIDDEN,)
        for name, size in (("q_proj", _HIDDEN), ("k_proj", key_size), ("v_proj", key_size)):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (size, _HIDDEN)
            shapes[f"{prefix}.self_attn.{name}.bias"] = (size,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (_HIDDEN, _HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.{name}.weight"] = (_FEED_FORWARD, _HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (_HIDDEN, _FEED_FORWARD)
    weights = {}
    for name, shape in shapes.items():
        values = 0.1 * torch.randn(shape, generator=generator)
        weights[name] = 1 + values if name.endswith("norm.weight") else values
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))


def make_sequences() -> list[TrainingSequence]:
    """Prompts of 2 to 8 tokens, answers of 1 to 9; four are wrong, nine right."""
    rng = np.random.default_rng(5)
    sequences = []
    for number in range(NUM_SEQUENCES):
        prompt, response = int(rng.integers(2, 9)), int(rng.integers(1, 10))
        # More right than wrong: a loss near 0 would have no meaningful relative difference.
        advantage = float(rng.uniform(0.5, 1.5)) * (-1.0 if number % 4 == 1 else 1.0)
        tokens = rng.integers(0, VOCAB_SIZE, prompt + response)
        sequences.append(TrainingSequence(tokens, prompt, advantage, np.zeros(response)))
    return sequences
