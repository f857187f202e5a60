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


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    return copy.copy_(tensor)
