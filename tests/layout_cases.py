"""Models, layouts and inputs of the distributed checks of models and weights; one spawn serves them all."""

from __future__ import annotations

import functools
import hashlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests.distributed import run_distributed
from tests.tiny_models import FAMILIES, MOE_FAMILIES, Family, make_tiny_model

VOCAB_SIZE = 107  # padded to 112: a multiple of 8 x TP
_TP2 = {"tensor_parallel_size": 2}
_TP2_SP = {**_TP2, "sequence_parallel": True}
_PP2 = {"pipeline_parallel_size": 2}
_EP2 = {"expert_parallel_size": 2}
_ETP2 = {"expert_tensor_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": _TP2,
    "tp2_sp": _TP2_SP,
    "pp2": _PP2,
    "tp2_pp2": {**_TP2, **_PP2},
    "tp2_sp_pp2": {**_TP2_SP, **_PP2},
    "pp2_vpp2": {**_PP2, "virtual_pipeline_parallel_size": 2},
    "ep2": _EP2,
    "tp2_sp_ep2_etp2": {**_TP2_SP, **_EP2, **_ETP2},
    "pp2_ep2": {**_PP2, **_EP2},
}
DENSE = [family for family in FAMILIES if family not in MOE_FAMILIES]
# Experts under tensor parallelism need sequence parallelism; one KV head cannot be divided.
_MOE_TP2 = [family for family in MOE_FAMILIES if family != "qwen3_moe_mixed"]
_FAMILIES_BY_LAYOUT: dict[str, list[Family]] = {
    "one": list(FAMILIES),
    "tp2": DENSE,
    "tp2_sp": ["qwen2", "qwen2_tied", "qwen3", *_MOE_TP2],
    "pp2": list(FAMILIES),
    "tp2_pp2": DENSE,
    "tp2_sp_pp2": ["qwen2_tied", "qwen3", *_MOE_TP2],
    "pp2_vpp2": ["qwen2", "qwen2_tied", "qwen3_moe_mixed", "deepseek_v3"],
    "ep2": list(MOE_FAMILIES),
    "tp2_sp_ep2_etp2": ["qwen3_moe", "deepseek_v3"],
    "pp2_ep2": ["mixtral", "qwen3_moe_mixed"],
}
CASES: list[tuple[Family, str, str]] = [
    *[(family, layout, "float32") for layout in LAYOUTS for family in _FAMILIES_BY_LAYOUT[layout]],
    ("qwen2", "pp2_vpp2", "bfloat16"),
    ("deepseek_v3", "pp2_vpp2", "bfloat16"),  # its selection bias stays in float32
]
BUCKET_BYTES = (20_000, 2**29)  # a few tensors at a time, all of a stage at once


@dataclass(frozen=True)
class Reference:
    """What transformers and the file say."""

    logits: list[Tensor]  # [T, V] of each micro-batch
    gradients: dict[str, Tensor]  # of the sum over micro-batches of logits * weights, by checkpoint name
    tensors: dict[str, Tensor] = field(repr=False)


def column_weights(num_columns: int) -> Tensor:
    """[num_columns]: what the loss of the gradient check multiplies each logit column with."""
    return torch.arange(num_columns) % 5 - 2.0


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(header + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def pack(tensors: Sequence[Tensor]) -> tuple[list[list[int]], Tensor]:
    """Shapes and values of many small tensors in one: the transport pays per tensor."""
    return [list(t.shape) for t in tensors], torch.cat([t.detach().flatten() for t in tensors])


def unpack(packed: tuple[list[list[int]], Tensor]) -> list[Tensor]:
    """What was packed."""
    shapes, flat = packed
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@functools.cache
def micro_batches() -> list[dict[str, Tensor]]:
    """Right-padded to one shape, with ragged masks; one has no trained token at all."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths, padded in (([5, 8, 3], 8), ([6, 6, 1], 8), ([4, 2, 0], 8), ([8, 6, 7], 8)):
        real = torch.arange(padded) < torch.tensor(lengths)[:, None]
        tokens = torch.randint(2, VOCAB_SIZE, real.shape, generator=generator) * real
        mask = (torch.rand(real.shape, generator=generator) > 0.4) & real
        batches.append({"tokens": tokens, "loss_mask": mask})
    batches[2]["loss_mask"][:] = False
    return batches


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def checkpoint(family: Family) -> Path:
    return make_tiny_model(Path(_folder().name, family), family, num_layers=4, vocab_size=VOCAB_SIZE)


@functools.cache
def reference(family: Family) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(family), attn_implementation="eager", experts_implementation="eager"
    )
    logits = [model(b["tokens"]).logits[b["loss_mask"]] for b in micro_batches()]
    torch.cat(logits).mul(column_weights(VOCAB_SIZE)).sum().backward()
    by_parameter = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = revert_weight_conversion(model, by_parameter)  # experts one by one
    tensors = load_file(checkpoint(family) / "model.safetensors")
    return Reference([rows.detach() for rows in logits], gradients, tensors)


@functools.cache
def results() -> dict[tuple[Family, str, str], list[dict[str, Any]]]:
    """Case -> what each of the four ranks saw (tests/workers/models_weights.py)."""
    cases = [
        {
            "hf_path": str(checkpoint(family)),
            "layout": LAYOUTS[layout],
            "dtype": dtype,
            "bucket_bytes": list(BUCKET_BYTES),
        }
        for family, layout, dtype in CASES
    ]
    payload = {"cases": cases, "micro_batches": micro_batches()}
    by_rank = run_distributed(4, "tests.workers.models_weights:check_layouts", payload)
    return {case: [results[index] for results in by_rank] for index, case in enumerate(CASES)}
