"""A configuration that loads, and what is said of one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from apo_megatron.config import RLConfig, load_config
from apo_megatron.errors import ConfigError

MINIMAL = """\
model: {hf_path: model}
data: {train_path: train.jsonl}
train: {run_dir: run, num_steps: 10}
"""
MINIMAL_EVAL = "model: {hf_path: model}\nbenchmarks: [math500]\n"


def problems(path: Path, overrides: Sequence[str] = (), cls: type[BaseModel] = RLConfig) -> list[str]:
    """The lines of the ConfigError, without the folder and without the headline of several problems."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    lines = [line.strip().replace(f"{path.parent}/", "") for line in str(caught.value).splitlines()]
    return lines[1:] if len(lines) > 1 else lines


def problem(path: Path, overrides: Sequence[str] = (), cls: type[BaseModel] = RLConfig) -> str:
    (line,) = problems(path, overrides, cls)
    return line
