"""What both commands check about their data before a model is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apo_megatron.config import SFTConfig
from apo_megatron.errors import ConfigError
from apo_megatron.training_data import load_supervised_data
from tests.tiny_models import make_tiny_model


def test_demonstrations_must_fit_into_the_model(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 6}))
    data = tmp_path / "data.jsonl"

    def load(response: str) -> None:
        data.write_text(json.dumps({"prompt": "w2 w3", "response": response}) + "\n")
        values = {
            "model": {"hf_path": str(model)},
            "data": {"train_path": str(data)},
            "train": {"run_dir": str(tmp_path), "num_steps": 1, "batch_size": 1},
        }
        load_supervised_data(SFTConfig.model_validate(values))

    load("w4 w5 w6")  # and the end of text: 6 tokens
    with pytest.raises(ConfigError, match="the longest example has 7 tokens, .* max_position_embeddings=6"):
        load("w4 w5 w6 w7")
