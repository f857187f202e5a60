"""The Triton kernels under Triton's interpreter: ``python -m tests.workers.vocab_kernels FOLDER``.

A process of its own, because TRITON_INTERPRET=1 must be set before triton is imported. Reads payload.pt in
the folder and writes result.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

from apo_megatron.parallel import _vocab_kernels, _vocab_rows_by_device
from apo_megatron.parallel.vocab import VocabShard
from tests.lm_head_cases import run_case
from tests.test_vocab_ops import run_alone


class _CountedKernels:
    """The kernels, and how often each function was called."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        self.calls[name] = self.calls.get(name, 0) + 1
        return getattr(_vocab_kernels, name)


def _round_as_gpus_do() -> None:
    """The interpreter rounds the product of an fma as well, and cuts off bits on the way to bf16."""

    def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
        result = x.data.astype(numpy.float64) * y.data + z.data
        return interpreter.TensorHandle(result.astype(z.data.dtype), z.dtype.scalar)

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != tl.bfloat16:
            return convert_float(data, source, target, rounding)
        assert data.dtype == numpy.float32
        return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()

    convert_float = interpreter._convert_float
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_fma = fma


def run(payload: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every case of "ops" and "head" with kernels in place of the torch functions."""
    _round_as_gpus_do()
    _vocab_kernels._SCRATCH_BYTES = 8  # Top-K of two rows of one block at a time
    kernels = _CountedKernels()
    _vocab_rows_by_device._is_on_gpu = lambda logits: True
    _vocab_rows_by_device._kernels = lambda: kernels
    results: dict[str, Any] = {"ops": {}, "head": {}}
    for name, case in payload["ops"].items():
        result = run_alone(case)
        results["ops"][name] = {**result, "terms": [term.detach() for term in result["terms"]]}
    for name, case in payload["head"].items():
        shard = VocabShard(0, len(case["weight"]), case["vocab_size"])
        results["head"][name] = run_case(case, shard)
    return {**results, "calls": kernels.calls}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(run(torch.load(folder / "payload.pt", weights_only=True)), folder / "result.pt")
