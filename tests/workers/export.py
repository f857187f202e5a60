"""Exports weights in the background while they go on changing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apo_megatron.config import ModelConfig, ParallelConfig
from apo_megatron.errors import CheckpointError
from apo_megatron.models.build import build_policy_model
from apo_megatron.models.hf_config import read_architecture
from apo_megatron.parallel.collectives import barrier
from apo_megatron.parallel.state import init_parallel
from apo_megatron.weights.export import HFExporter
from apo_megatron.weights.formats.safetensors_writer import ShardWriter
from apo_megatron.weights.load import load_hf_weights
from apo_megatron.weights.source import WeightSource


def export_while_training(payload: dict[str, Any]) -> dict[str, Any]:
    """What went wrong on this rank when a file could not be written, and whether it was put in place."""
    hf_path, folder = payload["model_path"], Path(payload["folder"])
    parallel = init_parallel(ParallelConfig(**payload["layout"]))
    architecture = read_architecture(hf_path)
    cfg = ModelConfig(hf_path=hf_path, dtype="float32", make_vocab_size_divisible_by=8)
    chunks = build_policy_model(architecture, cfg, parallel)
    load_hf_weights(chunks, architecture, hf_path, parallel)
    source = WeightSource(chunks, architecture, parallel)
    exporter = HFExporter(hf_path, parallel, max_shard_bytes=payload["max_shard_bytes"])

    exporter.start(folder / "first", source)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.add_(1.0)
    while not (folder / "first").exists():
        exporter.poll()
    exporter.start(folder / "second", source)  # replaces the one that is there
    exporter.finish()
    exporter.finish()  # nothing is under way

    original, message = ShardWriter.write, ""
    if parallel.rank == 1:
        ShardWriter.write = _disk_is_full  # type: ignore[method-assign,assignment]
    exporter.start(folder / "second", source)
    try:
        exporter.finish()
    except CheckpointError as error:
        message = str(error)
    ShardWriter.write = original  # type: ignore[method-assign]
    barrier(parallel)
    return {"message": message, "left": sorted(path.name for path in folder.iterdir())}


def _disk_is_full(*_positional: Any) -> None:
    raise OSError(28, "No space left on device", "model-00002-of-00003.safetensors")
