"""Reading config.json: what families share, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apo_megatron.errors import ConfigError
from apo_megatron.models.hf_config import read_architecture
from tests.tiny_models import Family, with_config


@pytest.mark.parametrize("family", ["qwen2", "llama3"])
def test_old_and_new_rope_keys_read_the_same(tmp_path: Path, family: Family) -> None:
    old = read_architecture(with_config(tmp_path / "old", family))
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    rope = {"rope_type": "default"} | config.get("rope_scaling", {}) | {"rope_theta": config["rope_theta"]}
    new = read_architecture(
        with_config(
            tmp_path / "new", family, rope_parameters=rope, rope_theta="absent", rope_scaling="absent"
        )
    )
    assert new == old
    assert (old.rope_scaling is not None) == (family == "llama3")


def test_head_dim_is_read_where_it_is_not_the_quotient(tmp_path: Path) -> None:
    architecture = read_architecture(with_config(tmp_path, "qwen3"))
    assert architecture.head_dim == 24 and architecture.hidden_size // architecture.num_heads == 16
    assert architecture.qk_norm and not architecture.qkv_bias


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"use_sliding_window": True}, ["use_sliding_window=True", "False"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope", "yarn", "default or llama3"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_hidden_layers": "absent"}, ["num_hidden_layers=None", "positive int"]),
        ({"vocab_size": 0}, ["vocab_size=0", "positive int"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
        ({"rope_scaling": "linear"}, ["rope_scaling='linear'", "an object"]),
        ({"rope_theta": None}, ["rope_theta=None", "positive float"]),
        ({"layer_types": 5}, ["layer_types=5"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings='false'", "true or false"]),
    ],
)
def test_unsupported_settings_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_architecture(with_config(tmp_path, **changes))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 4096}, ["sliding_window=4096"]),
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise=0.1"]),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, ["group_limited_greedy", "'greedy'"]),
        ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob=True"]),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, ["rms_norm_eps=1e-05", "1e-06"]),
        ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ("deepseek_v3", {"rope_interleave": False}, ["rope_interleave=False"]),
        ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq=2"]),
        ("deepseek_v3", {"rope_scaling": {**YARN, "attention_factor": 2.0}}, ["attention_factor"]),
        ("deepseek_v3", {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, ["mscale_all_dim", "or neither"]),
        ("deepseek_v3", {"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "at most"]),
    ],
)
def test_settings_that_a_family_cannot_compute_are_refused(
    tmp_path: Path, family: Family, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read_architecture(with_config(tmp_path, family, **changes))
    for word in [str(tmp_path / "config.json"), *words]:
        assert word in str(error.value)


def test_llama3_scaling_that_megatron_cannot_do_is_refused(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(ConfigError, match="low_freq_factor=1"):
        read_architecture(with_config(tmp_path, "llama3", rope_scaling=scaling))


def test_model_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        read_architecture(tmp_path / "no" / "model")
    with pytest.raises(ConfigError, match="config.json: missing"):
        read_architecture(tmp_path)
