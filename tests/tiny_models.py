"""Tiny Hugging Face checkpoints with random weights, written in well under a second, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

Family = Literal["qwen2", "qwen2_tied", "qwen3", "llama3"]
FAMILIES: tuple[Family, ...] = ("qwen2", "qwen2_tied", "qwen3", "llama3")
PAD_TOKEN_ID, EOS_TOKEN_ID = 0, 1

_ARCHITECTURES: dict[Family, dict[str, Any]] = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
}
_ARCHITECTURES["qwen2_tied"] = {**_ARCHITECTURES["qwen2"], "tie_word_embeddings": True}


def make_tiny_model(
    folder: str | Path,
    family: Family = "qwen2",
    seed: int = 0,
    vocab_size: int = 107,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 96,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> Path:
    """Write config.json, model.safetensors and (unless told not to) a tokenizer into ``folder``.

    Norm weights and biases are random too, so that a swapped or forgotten one shows. Qwen3's head_dim is
    hidden_size // num_heads + 8. The tokenizer is word-level: id i is the word ``w<i>``, 0 ``<pad>``,
    1 ``<eos>``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = hidden_size // num_heads + (8 if family == "qwen3" else 0)
    config = {
        **_ARCHITECTURES[family],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family.startswith("qwen2"):  # derived there, as in the published configs
        del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    tensors = _random_tensors(config, head_dim, torch.Generator().manual_seed(seed))
    save_file(
        {name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    if tokenizer:
        write_word_level_tokenizer(folder, vocab_size)
        if config["model_type"] == "qwen2":
            _keep_tokenizer_json(folder / "tokenizer_config.json")
    return folder


def write_word_level_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of exactly ``vocab_size`` words: ``<pad>``, ``<eos>``, ``w2``, ``w3``, ..."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(folder)


def _keep_tokenizer_json(path: Path) -> None:
    """Keep AutoTokenizer (transformers 5) from building a Qwen2Tokenizer, which knows none of our words.

    It does so for every config.json of model_type qwen2, whatever tokenizer_class says, unless an auto_map
    is present; a map to nothing leads it back to tokenizer.json.
    """
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, None]}}))


def _random_tensors(
    config: dict[str, Any], head_dim: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, std: float = 0.08) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, std=0.2), "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden, std=0.2)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(hidden),
            prefix + "post_attention_layernorm.weight": norm(hidden),
            prefix + "self_attn.q_proj.weight": matrix(q_size, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv_size, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv_size, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, q_size),
            prefix + "mlp.gate_proj.weight": matrix(ffn, hidden),
            prefix + "mlp.up_proj.weight": matrix(ffn, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, ffn),
        }
        if config["model_type"] == "qwen2":
            for projection, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
                tensors[prefix + f"self_attn.{projection}_proj.bias"] = matrix(1, size)[0]
        if config["model_type"] == "qwen3":
            tensors[prefix + "self_attn.q_norm.weight"] = norm(head_dim)
            tensors[prefix + "self_attn.k_norm.weight"] = norm(head_dim)
    return tensors
