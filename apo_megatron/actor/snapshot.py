"""Weights kept aside: the reference policy, one CPU copy per rank of its own shard, fixed or moving."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class WeightSnapshot:
    """A copy of parameters in host memory (pinned where there is a GPU) that can stand in for them."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._copies = [_host_copy(p.detach()) for p in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the snapshot inside the block; what they held is restored after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place and one tensor at a time, so that no second copy of the model exists.
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(copy)
            copy.copy_(current)


class AveragedWeights(WeightSnapshot):
    """A moving average of parameters, which starts as what they are: a snapshot that follows them.

    The average is kept in fp32: in bf16 a step of less than 2^-9 of a weight would be rounded away, and with
    a decay near 1 nearly all are. What stands in for the parameters is its rounding to their dtype.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        super().__init__(parameters)
        self._decay = decay
        self._averages = [_host_copy(p.detach(), torch.float32) for p in self._parameters]

    @property
    def averages(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each parameter with its average, fp32 in host memory; call ``refresh`` after changing one."""
        return list(zip(self._parameters, self._averages, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * parameter."""
        for parameter, average in self.averages:
            # On the device, one tensor at a time: the host takes seconds for a billion parameters.
            moved = average.to(parameter.device).lerp_(parameter.detach().float(), 1 - self._decay)
            average.copy_(moved)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """What stands in for the parameters is the average as it is now."""
        for copy, average in zip(self._copies, self._averages, strict=True):
            copy.copy_(average)


def _host_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    return copy.copy_(tensor)
