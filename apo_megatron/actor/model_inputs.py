"""One micro-batch as the model sees it: padded or packed, and this rank's part of the context.

Both are a table ``source`` [B, S] that says which token of which sequence stands where; everything else is
read through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apo_megatron.models.packed_sequences import HOST_FIELDS, PackedSequences, context_positions
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.types import ContextSplit, PaddedSequences, TrainedTokens

PADDING = -1


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a micro-batch stand, on all context-parallel ranks together."""

    source: np.ndarray  # [B, S] int64, row * width + position of the sequences; PADDING where there is none
    lengths: tuple[int, ...] | None  # of packed sequences, padding included (B = 1); None: padded rows

    @property
    def length(self) -> int:
        return int(self.source.shape[1])


@dataclass(frozen=True)
class ModelInput:
    """What one forward step needs. C context-parallel ranks have S / C columns each."""

    tokens: Tensor  # [B, S / C] int64
    positions: Tensor  # [B, S / C] int64, in the sequence
    is_real: Tensor  # [B, S / C] bool, False where there is padding
    loss_mask: Tensor  # [B, S / C] bool
    packed: PackedSequences | None
    trained: TrainedTokens  # where loss_mask is True, row-major
    num_sequences: int  # with trained tokens, on all context-parallel ranks together
    num_trained: int  # tokens, likewise

    def to(self, device: torch.device) -> ModelInput:
        """The same on the device, where the sequences are not."""
        return _moved(self, device)


def _moved(values: Any, device: torch.device) -> Any:
    """A copy of a dataclass with its tensors, and those of the dataclasses in it, on ``device``."""
    if device.type == "cpu":
        return values
    moved: dict[str, Any] = {}
    for item in fields(values):
        value = getattr(values, item.name)
        if item.name in HOST_FIELDS:
            continue
        if isinstance(value, Tensor):
            # Pinned, or the host would wait here for all that the device has been given to do.
            moved[item.name] = value.pin_memory().to(device, non_blocking=True)
        elif is_dataclass(value):
            moved[item.name] = _moved(value, device)
    return replace(values, **moved)


def padded_layout(
    rows: Sequence[int], lengths: Sequence[int], num_rows: int, length: int, width: int
) -> Layout:
    """Sequences ``rows`` with ``lengths[row]`` tokens each, right-padded to [num_rows, length]."""
    source = np.full((num_rows, length), PADDING)
    for place, row in enumerate(rows):
        source[place, : lengths[row]] = row * width + np.arange(lengths[row])
    return Layout(source, None)


def packed_layout(
    rows: Sequence[int], lengths: Sequence[int], multiple: int, length: int, width: int
) -> Layout:
    """Sequences ``rows``, each padded to a multiple of ``multiple``, then padding up to ``length``.

    That padding is a sequence of its own: nothing attends to it.
    """
    source = np.full(length, PADDING)
    padded = [round_up(lengths[row], multiple) for row in rows]
    start = 0
    for row, size in zip(rows, padded, strict=True):
        source[start : start + lengths[row]] = row * width + np.arange(lengths[row])
        start += size
    assert start <= length, f"{start} tokens do not fit into {length}"
    return Layout(source[None], tuple(padded + [length - start] * (start < length)))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not smaller than ``value``."""
    return -(-value // multiple) * multiple


def make_model_input(
    sequences: PaddedSequences, layout: Layout, parallel: ParallelContext
) -> tuple[ModelInput, Tensor]:
    """This rank's part of ``layout``, and where its trained tokens [T] lie in the flattened sequences.

    All in host memory, as the sequences are.
    """
    width = sequences.tokens.shape[1]
    columns = context_positions(
        layout.lengths or [layout.length], parallel.context_rank, parallel.dims.context
    )
    source = torch.from_numpy(layout.source[:, columns])
    is_real = source != PADDING
    index = source.clamp(min=0)
    loss_mask = sequences.loss_mask.flatten()[index] & is_real
    found = source[loss_mask]
    everywhere = layout.source[layout.source != PADDING]
    num_trained = sequences.loss_mask.flatten()[torch.from_numpy(everywhere)].sum()
    split = None
    if parallel.dims.context > 1:
        whole = torch.from_numpy(layout.source)
        is_trained = sequences.loss_mask.flatten()[whole.clamp(min=0)] & (whole != PADDING)
        places = is_trained.flatten().cumsum(0).view_as(is_trained) - 1
        split = ContextSplit(whole[is_trained] // width, places[:, columns][loss_mask])
    model_input = ModelInput(
        tokens=sequences.tokens.flatten()[index].masked_fill(~is_real, 0),
        positions=(index % width).masked_fill(~is_real, 0),
        is_real=is_real,
        loss_mask=loss_mask,
        packed=None if layout.lengths is None else PackedSequences.of_lengths(layout.lengths),
        trained=replace(sequences.tokens_at(found), split=split),
        num_sequences=len(np.unique(everywhere // width)),
        num_trained=int(num_trained),
    )
    return model_input, found
