"""The random state of this rank as JSON: torch's, the device's, Megatron's streams, NumPy's and Python's.

Nothing in the program draws from them today (samples and data order have seeds of their own); they are kept
so that a model with dropout, or a reward that draws, resumes exactly, too.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from apo_megatron.parallel.state import ParallelContext


def get_random_state(parallel: ParallelContext) -> dict[str, Any]:
    """Everything that random numbers of this process depend on, as JSON can hold it."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    streams = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "torch": _to_text(torch.get_rng_state()),
        "device": None if _is_host(parallel) else _to_text(_device(parallel).get_rng_state()),
        "megatron": {name: _to_text(state) for name, state in streams.items()},
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any], parallel: ParallelContext) -> None:
    """Go on from what ``get_random_state`` gave on the same rank of the same layout."""
    torch.set_rng_state(_to_tensor(state["torch"]))
    if not _is_host(parallel):
        _device(parallel).set_rng_state(_to_tensor(state["device"]))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name: _to_tensor(text) for name, text in state["megatron"].items()}
    )
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def seed_random_state(seed: int) -> None:
    """Start from ``seed``, with streams of their own for the ranks that must differ."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _is_host(parallel: ParallelContext) -> bool:
    return parallel.device.type == "cpu"


def _device(parallel: ParallelContext) -> Any:
    return torch.get_device_module(parallel.device)


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
