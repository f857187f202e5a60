"""Tiny Hugging Face checkpoints with random weights, written in well under a second, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

Family = Literal[
    "qwen2",
    "qwen2_tied",
    "qwen3",
    "llama3",
    "llama3_tied",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "qwen3_moe_mixed",
    "deepseek_v2",
    "deepseek_v3",
]
FAMILIES: tuple[Family, ...] = get_args(Family)
MOE_FAMILIES: tuple[Family, ...] = FAMILIES[FAMILIES.index("mixtral") :]
PAD_TOKEN_ID, EOS_TOKEN_ID = 0, 1

_SIZES: dict[str, Any] = {
    "vocab_size": 107,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 16,
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
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 56,
    "head_dim": 20,
    "intermediate_size": 88,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_QWEN3_MOE = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_DEEPSEEK = {
    "hidden_size": 56,
    "num_key_value_heads": 4,
    "intermediate_size": 88,
    "moe_intermediate_size": 36,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
# Sizes that differ from _SIZES belong to the family; all sizes are such that no two matrices look alike.
_ARCHITECTURES: dict[Family, dict[str, Any]] = {
    "qwen2": _QWEN2,
    "qwen2_tied": {**_QWEN2, "tie_word_embeddings": True},
    "qwen3": _QWEN3,
    "llama3": _LLAMA3,
    "llama3_tied": {**_LLAMA3, "hidden_size": 72, "head_dim": 20, "tie_word_embeddings": True},
    "mistral": _MISTRAL,
    "mixtral": {
        **_MISTRAL,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 44,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": _QWEN3_MOE,
    # A dense layer, weights of the chosen experts that do not sum to 1, and one KV head (so TP1 only).
    "qwen3_moe_mixed": {
        **_QWEN3_MOE,
        "num_key_value_heads": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": False,
    },
    "deepseek_v2": {  # as V2-Lite: queries without a latent
        **_DEEPSEEK,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": 28,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 64,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,  # so short that tiny inputs feel the stretching
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
}


def make_tiny_model(
    folder: str | Path,
    family: Family = "qwen2",
    seed: int = 0,
    vocab_size: int | None = None,
    hidden_size: int | None = None,
    num_layers: int = 2,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
) -> Path:
    """Write config.json, model.safetensors and (unless told not to) a tokenizer into ``folder``.

    Sizes that are not given are the family's. Names and shapes of the tensors are those that transformers
    gives them. Norm weights and biases are random too, so that a swapped or forgotten one shows. The
    tokenizer is word-level: id i is the word ``w<i>``, 0 ``<pad>``, 1 ``<eos>``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size,
    }
    config = {
        **_SIZES,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_ARCHITECTURES[family],
        **{key: value for key, value in given.items() if value is not None},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2))
    _write_random_weights(folder, config["tie_word_embeddings"], seed, dtype)
    path.write_text(json.dumps(config, indent=2))  # in the form of published models, not in transformers' own
    generation = {"eos_token_id": EOS_TOKEN_ID, "pad_token_id": PAD_TOKEN_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        write_word_level_tokenizer(folder, config["vocab_size"])
        if config["model_type"] == "qwen2":
            _keep_tokenizer_json(folder / "tokenizer_config.json")
    return folder


def with_config(folder: Path, family: Family = "qwen2", **changes: Any) -> Path:
    """A tiny model without tokenizer, and with ``changes`` in config.json ("absent": no such key)."""
    make_tiny_model(folder, family, tokenizer=False)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
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


def _write_random_weights(folder: Path, tied: bool, seed: int, dtype: torch.dtype) -> None:
    with torch.device("meta"):  # shapes only, and no draw from the global random state
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 0.08
        # As in published checkpoints, the bias that decides among experts stays in float32.
        tensors[name] = values if name.endswith("e_score_correction_bias") else values.to(dtype)
    if tied:
        del tensors["lm_head.weight"]
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=tensors)
