"""Weights kept aside: the reference policy, one CPU copy per rank of its own shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class WeightSnapshot:
    """A copy of parameters in host memory (pinned where there is a GPU) that can stand in for them."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._copies = [_host_copy(p.detach()) for p in self._parameters]

    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies)

    @torch.no_grad()
    def _exchange(self, num_tensors: int) -> Iterator[int]:
        # In place and one tensor at a time, so that no second copy of the model exists.
        for index in range(num_tensors):
            parameter, copy = self._parameters[index], self._copies[index]
            current = parameter.detach().clone()
            parameter.copy_(copy)
            copy.copy_(current)
            yield index + 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the snapshot inside the block; what they held is restored after it."""
        exchanged = 0
        try:
            for exchanged in self._exchange(len(self._parameters)):
                pass
            yield
        finally:
            for _ in self._exchange(exchanged):
                pass


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    return copy.copy_(tensor)
