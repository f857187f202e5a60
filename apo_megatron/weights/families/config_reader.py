"""Typed reading of a ``config.json``, with errors that name the file, the key and what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo_megatron.errors import ConfigError
from apo_megatron.weights.architecture import Llama3RopeScaling, YarnRopeScaling

# Settings that change the computation in every family: (key, the values we compute).
_EXPECTED_VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
    ("use_sliding_window", (False, None)),
    ("partial_rotary_factor", (1.0, None)),
    ("pretraining_tp", (1, None)),
    ("quantization_config", (None,)),
)


class ConfigReader:
    """The values of one ``config.json``. Every method raises ConfigError for what cannot be used."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config

    def error(self, key: str, found: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}={found!r} is not supported; expected {expected}")

    def expect(self, key: str, *values: Any) -> None:
        """The key is absent or has one of ``values``."""
        if key in self.config and self.config[key] not in values:
            raise self.error(key, self.config[key], " or ".join(map(repr, values)))

    def integer(self, *keys: str) -> int:
        """A positive integer under the first of ``keys`` that is there."""
        key = self._first(keys)
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(key, value, "a positive int")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(key, value, "a positive float")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def common(self, rope_types: tuple[str, ...] = ("default", "llama3")) -> dict[str, Any]:
        """The fields of Architecture that all families have, after the settings that all refuse.

        ``head_dim`` may be left out of config.json; it is then hidden_size / num_attention_heads.
        ``rope_types`` are those that the family's attention computes.
        """
        for key, values in _EXPECTED_VALUES:
            self.expect(key, *values)
        layer_types = set(self.config.get("layer_types") or ()) - {"full_attention"}
        if layer_types:
            raise self.error("layer_types", sorted(layer_types), "full_attention in every layer")
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise self.error(
                "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}"
            )
        rope_theta, rope_scaling = self._rope(rope_types)
        return {
            "model_type": self.config["model_type"],
            "num_layers": self.integer("num_hidden_layers"),
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": self._head_dim(hidden_size, num_heads),
            "ffn_hidden_size": self.integer("intermediate_size"),
            "vocab_size": self.integer("vocab_size"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "norm_eps": self.number("rms_norm_eps"),
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "tied": bool(self.config.get("tie_word_embeddings", False)),
        }

    def _first(self, keys: tuple[str, ...]) -> str:
        return next((key for key in keys if key in self.config), keys[0])

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        head_dim = self.optional_integer("head_dim")
        if head_dim is None and hidden_size % num_heads:
            raise self.error("num_attention_heads", num_heads, f"a divisor of hidden_size={hidden_size}")
        return head_dim or hidden_size // num_heads

    def _rope(self, rope_types: tuple[str, ...]) -> tuple[float, Llama3RopeScaling | YarnRopeScaling | None]:
        """transformers 5 writes ``rope_parameters``; before, it was ``rope_theta`` and ``rope_scaling``."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = float(rope.get("rope_theta", self.config.get("rope_theta", 10000.0)))
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in rope_types:
            raise self.error("rope type", rope_type, " or ".join(rope_types))
        if rope_type == "default":
            return theta, None
        return theta, self._llama3(rope) if rope_type == "llama3" else self._yarn(rope)

    def _llama3(self, rope: Mapping[str, Any]) -> Llama3RopeScaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        self._require(rope, names, "llama3")
        # Megatron-Core's rotary embedding takes only the factor; the other three are fixed there.
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        if found := {name: rope[name] for name, value in fixed.items() if rope[name] != value}:
            raise self.error("rope parameters", found, ", ".join(f"{n}={v}" for n, v in fixed.items()))
        return Llama3RopeScaling(**{name: rope[name] for name in names})

    def _yarn(self, rope: Mapping[str, Any]) -> YarnRopeScaling:
        self._require(rope, ("factor", "original_max_position_embeddings"), "yarn")
        fixed = {"attention_factor": None, "truncate": True}
        if found := {name: rope[name] for name, value in fixed.items() if rope.get(name, value) != value}:
            raise self.error("rope parameters", found, "neither attention_factor nor truncate")
        has_both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
        return YarnRopeScaling(
            factor=float(rope["factor"]),
            original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=float(rope["mscale"]) if has_both else 1.0,  # without the other it is not used
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
        )

    def _require(self, rope: Mapping[str, Any], names: tuple[str, ...], rope_type: str) -> None:
        if missing := [name for name in names if name not in rope]:
            raise self.error("rope parameters", sorted(rope), f"{', '.join(missing)} for type {rope_type}")
