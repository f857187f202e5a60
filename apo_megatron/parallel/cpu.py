"""The one place that adapts Megatron-Core to a machine without a GPU.

Megatron-Core names CUDA in a few spots that run on every machine: the current device, the CUDA random
state, literal ``device="cuda"`` and the optimizer's check of ``Tensor.type()``. ``install`` redirects
those to the CPU, for the whole process, and does nothing where a GPU is present.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TENSOR_CUDA, _TENSOR_TYPE = torch.Tensor.cuda, torch.Tensor.type


class _CudaLiteralsToCpu(TorchFunctionMode):
    """Turns literal CUDA devices into the CPU; lives per thread (re-enter it in worker threads)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every torch call of the process comes through here: the common ones leave first.
        if not kwargs:
            if func is _TENSOR_CUDA:
                return args[0]
            result = func(*args)
            if func is _TENSOR_TYPE and isinstance(result, str):
                # Megatron's optimizers accept only parameters that call themselves torch.cuda.*Tensor.
                return result.replace("torch.", "torch.cuda.", 1)
            return result
        device = kwargs.get("device")
        if device is not None and "cuda" in str(device):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return args[0] if func is _TENSOR_CUDA else func(*args, **kwargs)


_installed: list[_CudaLiteralsToCpu] = []


def install() -> None:
    """Adapt this process once. No effect where CUDA is available."""
    if torch.cuda.is_available() or _installed:
        return

    def get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.manual_seed = torch.default_generator.manual_seed  # type: ignore[assignment]
    from megatron.core.tensor_parallel import random as megatron_random  # imports need the lines above

    # The original queues the call for a CUDA start-up that never comes.
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    mode = _CudaLiteralsToCpu()
    mode.__enter__()
    _installed.append(mode)
