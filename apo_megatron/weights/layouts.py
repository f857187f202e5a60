"""How one Megatron parameter is cut out of Hugging Face tensors, and put together again. Pure tensor code.

Every layout maps a list of full Hugging Face tensors to one shard per tensor-parallel rank and back, bit
for bit. Linear weights are [out, in] on both sides. ``tp`` ranks each hold an equal share of ``num_units``
indivisible units (rows, columns, KV groups); callers check that ``tp`` divides it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(ABC):
    """One parameter's correspondence; all sizes are those of the unsharded model."""

    @property
    @abstractmethod
    def hf_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the Hugging Face tensors, in the order in which they are passed."""

    @property
    @abstractmethod
    def num_units(self) -> int | None:
        """What the tensor-parallel size must divide; None = every rank holds everything."""

    @abstractmethod
    def local_shape(self, tp_size: int) -> Shape:
        """Shape of one rank's shard."""

    @abstractmethod
    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        """The shard of ``tp_rank``, shaped ``local_shape(tp_size)``; may share memory with the input."""

    def pieces(self, hf_tensors: Sequence[Tensor]) -> list[Tensor]:
        """``to_megatron`` for one rank, in pieces that follow each other in it: a writer needs no copy."""
        return [self.to_megatron(hf_tensors, 0, 1)]

    @abstractmethod
    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Full tensors, shaped ``hf_shapes``, from all shards in rank order; may share memory with them."""


@dataclass(frozen=True)
class Replicated(Layout):
    """The same tensor on every rank: norms."""

    shape: Shape

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def num_units(self) -> None:
        return None

    def local_shape(self, tp_size: int) -> Shape:
        return self.shape

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        return hf_tensors[0]

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class _Split(Layout):
    """Equal slices along one dim."""

    shape: Shape
    dim = 0

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    @property
    def num_units(self) -> int:
        return self.shape[self.dim]

    def local_shape(self, tp_size: int) -> Shape:
        return _shrink(self.shape, self.dim, tp_size)

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        return _part(hf_tensors[0], self.dim, tp_rank, tp_size)

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenate(shards, self.dim)]


class ColumnParallel(_Split):
    """Output features divided over ranks: rows of the [out, in] weight, or the bias [out]."""

    dim = 0


class RowParallel(_Split):
    """Input features divided over ranks: columns of the [out, in] weight."""

    dim = 1


@dataclass(frozen=True)
class FusedQKV(Layout):
    """Query, key and value projections in one parameter, grouped by KV head.

    Megatron's rows are, for each KV group, the queries of that group, its key, its value, each of
    ``head_dim`` rows; ranks take whole groups. ``input_size`` None describes the bias.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    input_size: int | None

    @property
    def _row(self) -> Shape:
        return () if self.input_size is None else (self.input_size,)

    @property
    def _heads(self) -> tuple[int, int, int]:
        """Query, key and value heads of one KV group."""
        return self.num_heads // self.num_kv_heads, 1, 1

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return tuple((self.num_kv_heads * heads * self.head_dim, *self._row) for heads in self._heads)

    @property
    def num_units(self) -> int:
        return self.num_kv_heads

    def local_shape(self, tp_size: int) -> Shape:
        return (self.num_kv_heads // tp_size * sum(self._heads) * self.head_dim, *self._row)

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        groups = self.num_kv_heads // tp_size
        parts = [
            _part(tensor, 0, tp_rank, tp_size).reshape(groups, heads, self.head_dim, *self._row)
            for tensor, heads in zip(hf_tensors, self._heads, strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 2)

    def pieces(self, hf_tensors: Sequence[Tensor]) -> list[Tensor]:
        groups = zip(*(tensor.chunk(self.num_kv_heads) for tensor in hf_tensors), strict=True)
        return [part for group in groups for part in group]

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        groups = self.num_kv_heads // len(shards)
        split = [
            shard.view(groups, sum(self._heads), self.head_dim, *self._row).split(self._heads, dim=1)
            for shard in shards
        ]
        return [torch.cat(parts).flatten(0, 2) for parts in zip(*split, strict=True)]


@dataclass(frozen=True)
class FusedGateUp(Layout):
    """Gate and up projections in one parameter: each rank holds [its gate rows; its up rows]."""

    ffn_hidden_size: int
    input_size: int

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.ffn_hidden_size, self.input_size),) * 2

    @property
    def num_units(self) -> int:
        return self.ffn_hidden_size

    def local_shape(self, tp_size: int) -> Shape:
        return (2 * (self.ffn_hidden_size // tp_size), self.input_size)

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        return torch.cat([_part(tensor, 0, tp_rank, tp_size) for tensor in hf_tensors])

    def pieces(self, hf_tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(hf_tensors)

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        gates_and_ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return [_concatenate(parts, 0) for parts in gates_and_ups]


@dataclass(frozen=True)
class VocabParallel(Layout):
    """Rows are token ids, padded with zero rows to ``padded_vocab_size`` on Megatron's side only."""

    vocab_size: int
    padded_vocab_size: int
    hidden_size: int

    @property
    def hf_shapes(self) -> tuple[Shape, ...]:
        return ((self.vocab_size, self.hidden_size),)

    @property
    def num_units(self) -> int:
        return self.padded_vocab_size

    def local_shape(self, tp_size: int) -> Shape:
        return (self.padded_vocab_size // tp_size, self.hidden_size)

    def to_megatron(self, hf_tensors: Sequence[Tensor], tp_rank: int, tp_size: int) -> Tensor:
        (tensor,) = hf_tensors
        num_rows = self.padded_vocab_size // tp_size
        start = min(tp_rank * num_rows, self.vocab_size)
        real = tensor[start : min(start + num_rows, self.vocab_size)]
        padding = real.new_zeros(num_rows - real.shape[0], self.hidden_size)
        return torch.cat([real, padding]) if padding.shape[0] else real

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenate(shards, 0)[: self.vocab_size]]


def _part(tensor: Tensor, dim: int, index: int, num_parts: int) -> Tensor:
    size = tensor.shape[dim] // num_parts
    return tensor.narrow(dim, index * size, size)


def _shrink(shape: Shape, dim: int, num_parts: int) -> Shape:
    return (*shape[:dim], shape[dim] // num_parts, *shape[dim + 1 :])


def _concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
