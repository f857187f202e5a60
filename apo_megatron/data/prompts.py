"""Training and evaluation prompts: JSONL rows -> tokenised ``Prompt`` objects -> batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from apo_megatron.data.epochs import EpochOrder
from apo_megatron.data.jsonl import read_rows
from apo_megatron.data.tokenizer import encode_texts
from apo_megatron.errors import CheckpointError, DataError
from apo_megatron.types import Prompt

logger = logging.getLogger(__name__)


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    max_length: int | None = None,
    required_fields: Mapping[str, type] = MappingProxyType({}),
    max_rows: int | None = None,
) -> list[Prompt]:
    """Prompts of a JSONL file, in file order.

    ``prompt_id`` is the row's "id" (string or integer), or "line-N". Prompts of more than ``max_length``
    tokens are left out, and their number logged; ``max_rows`` reads the first so many rows.
    ``required_fields`` are columns with their types that every row must have (``Reward.required_fields``).
    Raises DataError naming file and line for anything that cannot be used.
    """
    prompt_ids: list[str] = []
    texts: list[str] = []
    other_fields: list[dict[str, Any]] = []
    line_numbers: list[int] = []
    line_of_id: dict[str, int] = {}
    for line_number, row in read_rows(path, {prompt_field: str, **required_fields}):
        prompt_id = _prompt_id(row, path, line_number)
        first_line = line_of_id.setdefault(prompt_id, line_number)
        if first_line != line_number:
            raise DataError(
                f"{path}:{line_number}: id {prompt_id!r} was used in line {first_line} already: ids must be "
                "unique, or left out"
            )
        prompt_ids.append(prompt_id)
        texts.append(row.pop(prompt_field))
        other_fields.append(row)
        line_numbers.append(line_number)
        if len(texts) == max_rows:
            break

    prompts = []
    encoded = encode_texts(tokenizer, texts, path, line_numbers)
    for i, token_ids in enumerate(encoded):
        if not token_ids:
            raise DataError(
                f"{path}:{line_numbers[i]}: column {prompt_field!r} has no tokens: write a prompt"
            )
        if max_length is None or len(token_ids) <= max_length:
            tokens = np.array(token_ids, dtype=np.int32)
            prompts.append(Prompt(prompt_ids[i], texts[i], tokens, other_fields[i]))

    num_left_out = len(texts) - len(prompts)
    if not prompts:
        raise DataError(
            f"{path}: all {num_left_out} prompts are longer than max_prompt_length={max_length} tokens: "
            "raise it"
        )
    if num_left_out:
        logger.warning(
            "%s: left out %d of %d prompts, longer than %s tokens", path, num_left_out, len(texts), max_length
        )
    return prompts


def _prompt_id(row: dict[str, Any], path: str | Path, line_number: int) -> str:
    value = row.get("id", f"line-{line_number}")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{path}:{line_number}: column 'id' is {value!r}, expected a string or an integer")
    return str(value)


class PromptLoader:
    """Endless prompts, the same on every rank, resumable anywhere."""

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int, shuffle: bool) -> None:
        """Raises DataError where there are too few prompts for one batch."""
        if len(prompts) < prompts_per_step:
            raise DataError(
                f"the dataset has {len(prompts)} usable prompts, fewer than "
                f"data.prompts_per_step={prompts_per_step}: lower that, or add prompts"
            )
        self._prompts = prompts
        self._order = EpochOrder(len(prompts), seed, shuffle)

    def first(self, count: int) -> list[Prompt]:
        """The first ``count`` of the data, whatever was drawn."""
        return list(self._prompts[:count])

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; they may straddle two epochs."""
        return [self._prompts[i] for i in self._order.take(count)] if count else []

    def with_ids(self, prompt_ids: Sequence[str]) -> list[Prompt]:
        """The prompts of these ids. Raises CheckpointError for one that the data does not have."""
        by_id = {prompt.prompt_id: prompt for prompt in self._prompts}
        missing = [prompt_id for prompt_id in prompt_ids if prompt_id not in by_id]
        if missing:
            raise CheckpointError(
                f"the checkpoint was drawing samples for the prompt {missing[0]!r}, which data.train_path "
                "does not have: resume with the same data, or start anew with checkpoint.resume=never"
            )
        return [by_id[prompt_id] for prompt_id in prompt_ids]

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as plain numbers."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises CheckpointError where data or seed are others."""
        self._order.load_state_dict(state)
