"""Two tiny models of one architecture, the same files for all tests: servers are shared by model path."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests.tiny_models import make_tiny_model

VOCAB_SIZE, MAX_POSITIONS = 107, 32768
_folder = tempfile.TemporaryDirectory(prefix="sglang_models_")


@functools.cache
def served_model() -> Path:
    """The one that servers start with."""
    return make_tiny_model(Path(_folder.name, "served"), "qwen3", seed=0)


@functools.cache
def other_model() -> Path:
    """Other weights, for updates."""
    return make_tiny_model(Path(_folder.name, "other"), "qwen3", seed=1)
