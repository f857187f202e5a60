"""The policy as a Hugging Face checkpoint, streamed out of the sharded model."""

from __future__ import annotations

from pathlib import Path

from apo_megatron.models.hf_config import resolve_model_path
from apo_megatron.parallel.collectives import barrier
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.weights.hf_checkpoint import write_hf_checkpoint
from apo_megatron.weights.source import WeightSource


def export_hf_checkpoint(
    folder: str | Path, source: WeightSource, hf_path: str | Path, parallel: ParallelContext
) -> None:
    """Write safetensors, and config and tokenizer of ``hf_path``, to ``folder``. Collective."""
    tensors = (named for bucket in source.buckets() for named in bucket)
    if parallel.is_main:
        write_hf_checkpoint(folder, source.tensor_specs(), tensors, resolve_model_path(hf_path))
    else:
        for _ in tensors:  # the other ranks take part in the gathers
            pass
    barrier(parallel)
