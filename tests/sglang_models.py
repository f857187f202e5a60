"""Two tiny models of one architecture, the same files for all tests: servers are shared by model path."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from tests.tiny_models import make_tiny_model

VOCAB_SIZE, MAX_POSITIONS = 107, 32768
_folder = tempfile.TemporaryDirectory(prefix="sglang_models_")


@functools.cache
def served_model() -> Path:
    """The one that servers start with."""
    return _make("served", seed=0)


@functools.cache
def other_model() -> Path:
    """Other weights, for updates."""
    return _make("other", seed=1)


def _make(name: str, seed: int) -> Path:
    """Without an EOS of its own: completions end at the stop tokens that a test sends, or not at all."""
    folder = make_tiny_model(Path(_folder.name, name), "qwen3", seed=seed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
