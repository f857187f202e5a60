"""Typed reading of a ``config.json``, with errors that name the file, the key and what is expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apo_megatron.errors import ConfigError
from apo_megatron.weights.architecture import Llama3RopeScaling, YarnRopeScaling

# Settings that change the weights of every family: (key, the values that are supported).
_WEIGHT_SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("attention_bias", (False, None)),
    ("mlp_bias", (False, None)),
    ("pretraining_tp", (1, None)),
    ("quantization_config", (None,)),
)
# Settings that change what is computed with them: (key, the values that we compute).
_COMPUTE_SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu",)),
    ("use_sliding_window", (False, None)),
    ("partial_rotary_factor", (1.0, None)),
)


class ConfigReader:
    """The values of one ``config.json``. Every method raises ConfigError for what cannot be used.

    ``weights_only``: the weights are converted, not computed with; settings that do not change their names
    and shapes are not looked at.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], weights_only: bool = False) -> None:
        self.path = path
        self.config = config
        self.weights_only = weights_only

    def error(self, key: str, found: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key}={found!r} is not supported; expected {expected}")

    def expect(self, key: str, *values: Any) -> None:
        """The key is absent or has one of ``values``."""
        if key in self.config and self.config[key] not in values:
            raise self.error(key, self.config[key], " or ".join(map(repr, values)))

    def expect_to_compute(self, key: str, *values: Any) -> None:
        """As ``expect``, for a setting that changes what is computed, but not the weights."""
        if not self.weights_only:
            self.expect(key, *values)

    def integer(self, *keys: str) -> int:
        """A positive integer under the first of ``keys`` that is there."""
        key = self._first(keys)
        value = self.config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(key, value, "a positive int")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.config.get(key) is None else self.integer(key)

    def count(self, key: str) -> int:
        """A whole number of at least 0; 0 where the key is absent or null."""
        return 0 if self.config.get(key) in (None, 0) else self.integer(key)

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

    def common(
        self, rope_types: tuple[str, ...] = ("default", "llama3"), rope_theta: float = 10000.0
    ) -> dict[str, Any]:
        """The fields of Architecture that all families have, after the settings that all refuse.

        ``head_dim`` may be left out of config.json; it is then hidden_size / num_attention_heads.
        ``rope_types`` are those that the family's attention computes, ``rope_theta`` is its default.
        """
        for key, values in _WEIGHT_SETTINGS:
            self.expect(key, *values)
        for key, values in _COMPUTE_SETTINGS:
            self.expect_to_compute(key, *values)
        layer_types = self.config.get("layer_types") or []
        is_full = isinstance(layer_types, list) and set(layer_types) <= {"full_attention"}
        if not self.weights_only and not is_full:
            raise self.error("layer_types", layer_types, "full_attention in every layer")
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise self.error(
                "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads={num_heads}"
            )
        rope_theta, rope_scaling = self._rope(rope_types, rope_theta)
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
            "tied": self.flag("tie_word_embeddings", default=False),
        }

    def _first(self, keys: tuple[str, ...]) -> str:
        return next((key for key in keys if key in self.config), keys[0])

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        head_dim = self.optional_integer("head_dim")
        if head_dim is None and hidden_size % num_heads:
            raise self.error("num_attention_heads", num_heads, f"a divisor of hidden_size={hidden_size}")
        return head_dim or hidden_size // num_heads

    def _rope(
        self, rope_types: tuple[str, ...], default_theta: float
    ) -> tuple[float, Llama3RopeScaling | YarnRopeScaling | None]:
        """transformers 5 writes ``rope_parameters``; before, it was ``rope_theta`` and ``rope_scaling``."""
        if self.weights_only:  # it has no weights
            return default_theta, None
        key = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        values = self.config.get(key) or {}
        if not isinstance(values, dict):
            raise self.error(key, values, "an object, or null")
        rope = ConfigReader(self.path, {**values, "type": values.get("rope_type", values.get("type"))})
        theta = (rope if "rope_theta" in values else self).number("rope_theta", default_theta)
        rope_type = rope.config["type"] or "default"
        if rope_type not in rope_types:
            raise self.error("rope type", rope_type, " or ".join(rope_types))
        if rope_type == "default":
            return theta, None
        return theta, rope._llama3() if rope_type == "llama3" else rope._yarn()

    def _llama3(self) -> Llama3RopeScaling:
        # Megatron-Core's rotary embedding takes only the factor; the other three are fixed there.
        fixed = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
        if found := {
            name: self.config.get(name) for name, value in fixed.items() if self.number(name) != value
        }:
            raise self.error("rope parameters", found, ", ".join(f"{n}={v}" for n, v in fixed.items()))
        return Llama3RopeScaling(
            factor=self.number("factor"),
            low_freq_factor=self.number("low_freq_factor"),
            high_freq_factor=self.number("high_freq_factor"),
            original_max_position_embeddings=self.integer("original_max_position_embeddings"),
        )

    def _yarn(self) -> YarnRopeScaling:
        self.expect("attention_factor", None)
        self.expect("truncate", True)
        has_scales = [name for name in ("mscale", "mscale_all_dim") if self.config.get(name)]
        if len(has_scales) == 1:  # transformers then uses it in one of two places
            raise self.error("rope parameters", has_scales, "both of mscale and mscale_all_dim, or neither")
        return YarnRopeScaling(
            factor=self.number("factor"),
            original_max_position_embeddings=self.integer("original_max_position_embeddings"),
            beta_fast=self.number("beta_fast", 32),
            beta_slow=self.number("beta_slow", 1),
            mscale=self.number("mscale") if has_scales else 1.0,
            mscale_all_dim=self.number("mscale_all_dim") if has_scales else 0.0,
        )
