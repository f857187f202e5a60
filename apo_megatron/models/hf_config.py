"""Reads a Hugging Face ``config.json`` into an Architecture; refuses what would be computed differently."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from apo_megatron.errors import ConfigError
from apo_megatron.weights.architecture import Architecture, Llama3RopeScaling, ModelType

SUPPORTED_MODEL_TYPES: tuple[ModelType, ...] = ("qwen2", "qwen3", "llama")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_NEEDED_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja"]
_REQUIRED = {
    "num_hidden_layers": int,
    "hidden_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "intermediate_size": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
}
# Settings that change the computation: (key, the values we compute).
_EXPECTED_VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
    ("use_sliding_window", (False, None)),
    ("partial_rotary_factor", (1.0, None)),
    ("pretraining_tp", (1, None)),
    ("quantization_config", (None,)),
)


def resolve_model_path(hf_path: str | Path) -> Path:
    """The directory itself, or the local snapshot of a hub id. Raises ConfigError where it is neither."""
    path = Path(hf_path)
    if path.is_dir():
        return path
    reason = "not a directory, and not of the form of a hub id (owner/name)"
    if _HUB_ID.match(str(hf_path)):
        try:
            return Path(snapshot_download(str(hf_path), allow_patterns=_NEEDED_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (
                f"not a directory, and as a hub id it could not be fetched ({type(error).__name__}: {error})"
            )
    raise ConfigError(f"model.hf_path={str(hf_path)!r}: {reason}. Give a directory with config.json")


def read_architecture(hf_path: str | Path) -> Architecture:
    """Architecture of a Qwen2/2.5, Qwen3 (dense) or Llama 3 checkpoint.

    Raises ConfigError, naming the file, for other model types and for settings that are not supported.
    """
    path = resolve_model_path(hf_path) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; model.hf_path must be a Hugging Face model directory") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    return _Reader(path, config).architecture()


class _Reader:
    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config

    def error(self, key: str, found: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}={found!r} is not supported; expected {expected}")

    def architecture(self) -> Architecture:
        config = self.config
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise self.error("model_type", model_type, "one of " + ", ".join(SUPPORTED_MODEL_TYPES))
        self._check_settings()
        sizes = {key: self._number(key, kind) for key, kind in _REQUIRED.items()}
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        if heads % kv_heads:
            raise self.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        rope_theta, rope_scaling = self._rope()
        return Architecture(
            model_type=model_type,
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self._head_dim(sizes["hidden_size"], heads),
            ffn_hidden_size=sizes["intermediate_size"],
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["max_position_embeddings"],
            norm_eps=sizes["rms_norm_eps"],
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
        )

    def _check_settings(self) -> None:
        for key, values in _EXPECTED_VALUES:
            if key in self.config and self.config[key] not in values:
                raise self.error(key, self.config[key], " or ".join(map(repr, values)))
        layer_types = set(self.config.get("layer_types") or ()) - {"full_attention"}
        if layer_types:
            raise self.error("layer_types", sorted(layer_types), "full_attention in every layer")

    def _number(self, key: str, kind: type) -> Any:
        value = self.config.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float) if kind is float else int)
            or value <= 0
        ):
            raise self.error(key, value, f"a positive {kind.__name__}")
        return kind(value)

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self.config.get("head_dim") is not None or self.config["model_type"] == "qwen3":
            return int(self._number("head_dim", int))
        if hidden_size % num_heads:
            raise self.error("num_attention_heads", num_heads, f"a divisor of hidden_size={hidden_size}")
        return hidden_size // num_heads

    def _rope(self) -> tuple[float, Llama3RopeScaling | None]:
        """transformers 5 writes ``rope_parameters``; before, it was ``rope_theta`` and ``rope_scaling``."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta", self.config.get("rope_theta", 10000.0)))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type == "default":
            return theta, None
        if rope_type != "llama3":
            raise self.error("rope type", rope_type, "default or llama3")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [name for name in names if name not in rope]:
            raise self.error("rope parameters", sorted(rope), f"{', '.join(missing)} for type llama3")
        # Megatron-Core's rotary embedding takes only the factor; the other three are fixed there.
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        if found := {name: rope[name] for name, value in fixed.items() if rope[name] != value}:
            raise self.error("rope parameters", found, ", ".join(f"{n}={v}" for n, v in fixed.items()))
        scaling = Llama3RopeScaling(**{name: rope[name] for name in names})
        return theta, scaling
