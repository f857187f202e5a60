"""Demonstrations for the supervised cold start, stored as one flat token array."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from apo_megatron.data.epochs import EpochOrder
from apo_megatron.data.jsonl import read_jsonl
from apo_megatron.data.rows import Row
from apo_megatron.data.tokenizer import encode_texts
from apo_megatron.errors import DataError

logger = logging.getLogger(__name__)

_ROWS_PER_CHUNK = 16_384  # encoded together: bounds the memory that Python lists take


@dataclass(frozen=True)
class Demonstrations:
    """Prompt and response tokens of many examples, 4 bytes a token."""

    tokens: np.ndarray  # [total] int32, all examples one after the other: prompt, response, EOS
    offsets: np.ndarray  # [N + 1] int64, example i is tokens[offsets[i] : offsets[i + 1]]
    prompt_lengths: np.ndarray  # [N] int32

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        """Tokens [length] int32 of example ``i`` (a view) and the number of them that are prompt."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]], int(self.prompt_lengths[i])


def load_demonstrations(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    response_field: str,
    max_length: int,
) -> Demonstrations:
    """Demonstrations of a JSONL file, in file order, EOS appended to every response.

    Prompt and response are encoded apart, as in a rollout, where the response starts at a token boundary.
    Examples of more than ``max_length`` tokens (EOS included) are left out, and their number logged.
    Raises DataError naming file and line for anything that cannot be used.
    """
    rows = read_jsonl(path)
    tokens: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    prompt_lengths: list[np.ndarray] = []
    num_rows = 0
    for places, prompts, responses in _chunks(rows, prompt_field, response_field):
        prompt_ids = encode_texts(tokenizer, prompts, places)
        response_ids = encode_texts(tokenizer, responses, places)
        prompt_length = np.fromiter(map(len, prompt_ids), dtype=np.int32, count=len(prompt_ids))
        if not prompt_length.all():
            place = places[int(prompt_length.argmin())]
            raise DataError(f"{place}: column {prompt_field!r} has no tokens: write a prompt")

        eos = [tokenizer.eos_token_id]
        examples = [[*p, *r, *eos] for p, r in zip(prompt_ids, response_ids, strict=True)]
        length = np.fromiter(map(len, examples), dtype=np.int64, count=len(examples))
        fits = length <= max_length
        kept = chain.from_iterable(example for example, keep in zip(examples, fits, strict=True) if keep)
        tokens.append(np.fromiter(kept, dtype=np.int32, count=int(length[fits].sum())))
        lengths.append(length[fits])
        prompt_lengths.append(prompt_length[fits])
        num_rows += len(examples)

    offsets = np.concatenate([[0], *lengths]).cumsum()
    demonstrations = Demonstrations(np.concatenate(tokens), offsets, np.concatenate(prompt_lengths))
    if len(demonstrations) == 0:
        raise DataError(
            f"{path}: all {num_rows} examples are longer than max_length={max_length} tokens: raise it"
        )
    num_left_out = num_rows - len(demonstrations)
    if num_left_out:
        logger.warning(
            "%s: left out %d of %d examples, longer than %d tokens", path, num_left_out, num_rows, max_length
        )
    return demonstrations


def _chunks(
    rows: Iterator[Row], prompt_field: str, response_field: str
) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """Places, prompts and responses of up to ``_ROWS_PER_CHUNK`` rows at a time."""
    while chunk := [
        (row.place, row.column(prompt_field, str), row.column(response_field, str))
        for row in islice(rows, _ROWS_PER_CHUNK)
    ]:
        places, prompts, responses = (list(column) for column in zip(*chunk, strict=True))
        yield places, prompts, responses


class DemonstrationLoader:
    """Endless batches of demonstrations, the same on every rank, resumable at any batch."""

    def __init__(self, demonstrations: Demonstrations, batch_size: int, seed: int, shuffle: bool) -> None:
        """Raises DataError where there are too few demonstrations for one batch."""
        if len(demonstrations) < batch_size:
            raise DataError(
                f"the dataset has {len(demonstrations)} usable examples, fewer than "
                f"train.batch_size={batch_size}: lower that, or add examples"
            )
        self._demonstrations = demonstrations
        self._batch_size = batch_size
        self._order = EpochOrder(len(demonstrations), seed, shuffle)

    def next_batch(self) -> list[tuple[np.ndarray, int]]:
        """``batch_size`` pairs of tokens [length] int32 and prompt length; may straddle two epochs."""
        return [self._demonstrations[i] for i in self._order.take(self._batch_size)]

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as plain numbers."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises CheckpointError where data or seed are others."""
        self._order.load_state_dict(state)
