"""A bucket of named tensors as one run of bytes, in the layout of SGLang's ``flattened_bucket``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies among the bytes of its bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


class FlatBucket:
    """Lays tensors out one after the other, without gaps.

    Those with the widest elements come first, so each starts at a multiple of its element size: the server
    views the bytes as the tensor's dtype, and refuses a broadcast in which a tensor does not.
    """

    def __init__(self, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
        self._tensors = sorted(named_tensors, key=lambda pair: -pair[1].dtype.itemsize)
        self.places = tuple(_places(self._tensors))
        self.num_bytes = self.places[-1].end

    def copy_to(self, flat: Tensor) -> None:
        """Write the bytes of all tensors to the start of ``flat`` [>= num_bytes] uint8, on their device."""
        for place, (_, tensor) in zip(self.places, self._tensors, strict=True):
            source, target = tensor.reshape(-1).view(torch.uint8), flat[place.start : place.end]
            if flat.device.type == "cpu":
                # One thread fills the memory's bandwidth. torch would wait for all of its threads at each
                # tensor, which on a busy machine takes several times as long as the copy.
                np.copyto(target.numpy(), source.numpy())
            else:
                target.copy_(source)

    def flatten(self, device: torch.device) -> Tensor:
        """[num_bytes] uint8 in new memory."""
        flat = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        self.copy_to(flat)
        return flat


def _places(named_tensors: Sequence[tuple[str, Tensor]]) -> Iterator[Place]:
    end = 0
    for name, tensor in named_tensors:
        start, end = end, end + tensor.nbytes
        yield Place(name, tuple(tensor.shape), tensor.dtype, start, end)


def pieces(named_tensors: Sequence[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors of at most ``max_bytes`` together; a larger one is a piece of its own."""
    held: list[tuple[str, Tensor]] = []
    held_bytes = 0
    for pair in named_tensors:
        if held and held_bytes + pair[1].nbytes > max_bytes:
            yield held
            held, held_bytes = [], 0
        held.append(pair)
        held_bytes += pair[1].nbytes
    if held:
        yield held
