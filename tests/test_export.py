"""Hugging Face checkpoints written in the background hold the weights of the moment they were asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import run_distributed
from tests.tiny_models import make_tiny_model


def test_background_export(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3")
    exports = tmp_path / "exports"
    payload = {
        "model_path": str(model),
        "folder": str(exports),
        "layout": {"tensor_parallel_size": 2},
        "max_shard_bytes": 60_000,
    }
    results = run_distributed(2, "tests.workers.export:export_while_training", payload)

    weights = load_file(model / "model.safetensors")
    for name, added in (("first", 0.0), ("second", 1.0)):
        files = sorted((exports / name).glob("*.safetensors"))
        assert len(files) > 2
        found = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key] + added) for key in weights)
        assert AutoTokenizer.from_pretrained(exports / name)("w5 w7")["input_ids"] == [5, 7]
    loaded = AutoModelForCausalLM.from_pretrained(exports / "second").state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"] + 1)

    # The failed third export, over the second, changed nothing and left nothing.
    assert "another rank says why" in results[0]["message"]
    assert "No space left on device" in results[1]["message"]
    assert all(result["left"] == ["first", "second"] for result in results)
