"""Finds a model's directory and reads its ``config.json``; what would be computed differently is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from apo_megatron.errors import ConfigError
from apo_megatron.weights.architecture import Architecture
from apo_megatron.weights.families import FAMILIES
from apo_megatron.weights.families.config_reader import ConfigReader

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_NEEDED_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja"]


def resolve_model_path(hf_path: str | Path, patterns: Sequence[str] = _NEEDED_FILES) -> Path:
    """The directory itself, or the local snapshot of a hub id. Raises ConfigError where it is neither.

    Of a hub id, files that match ``patterns`` are downloaded where they are not here yet.
    """
    path = Path(hf_path)
    if path.is_dir():
        return path
    reason = "not a directory, and not of the form of a hub id (owner/name)"
    if _HUB_ID.match(str(hf_path)):
        try:
            return Path(snapshot_download(str(hf_path), allow_patterns=list(patterns)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = (
                f"not a directory, and as a hub id it could not be fetched ({type(error).__name__}: {error})"
            )
    raise ConfigError(f"model.hf_path={str(hf_path)!r}: {reason}. Give a directory with config.json")


def read_architecture(hf_path: str | Path, weights_only: bool = False) -> Architecture:
    """Architecture of a checkpoint of one of the families.

    Raises ConfigError, naming the file, for other model types and for settings that are not supported.
    ``weights_only``: for converting the weights; settings that only change what is computed with them are
    then accepted, and left out. Of a hub id, config.json alone is downloaded.
    """
    path = resolve_model_path(hf_path, ["config.json"]) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; model.hf_path must be a Hugging Face model directory") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: a JSON object expected, found {type(config).__name__}")
    reader = ConfigReader(path, config, weights_only)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise reader.error("model_type", config.get("model_type"), "one of " + ", ".join(FAMILIES))
    architecture = family.read(reader)
    experts = architecture.experts
    if experts is not None and experts.top_k > experts.num_experts:
        raise reader.error("num_experts_per_tok", experts.top_k, f"at most {experts.num_experts} experts")
    return architecture
