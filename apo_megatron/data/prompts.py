"""Training and evaluation prompts: rows of a data set -> tokenised ``Prompt`` objects -> batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from apo_megatron.config.data import PromptFormat
from apo_megatron.data.chat import check_chat_template, prompt_text
from apo_megatron.data.epochs import EpochOrder
from apo_megatron.data.mixture import MixtureOrder, MixturePart
from apo_megatron.data.rows import Row
from apo_megatron.data.sources import read_source
from apo_megatron.data.tokenizer import encode_texts
from apo_megatron.errors import CheckpointError, DataError
from apo_megatron.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRow:
    """A row whose columns were checked: what a prompt is made of."""

    place: str
    prompt_id: str
    prompt: Any  # text, or chat messages: data/chat.py checks it
    fields: dict[str, Any]  # all other columns, and those that PromptFormat.fields names


def read_prompt_rows(
    path: str | Path,
    form: PromptFormat,
    required_fields: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[PromptRow]:
    """The rows of a data set (``read_source``), seen as ``form`` says.

    ``required_fields`` are fields with their types that every row must have (``Reward.required_fields``),
    under their own name or that of ``form.fields``. Raises DataError naming source, row and column.
    """
    columns = {name: name for name in required_fields} | dict(form.fields)
    for row in read_source(path, form.subset, form.split):
        prompt = row.column(form.prompt_field)
        fields = {
            name: row.column(column, required_fields.get(name, object), meaning=name)
            for name, column in columns.items()
        }
        yield PromptRow(row.place, _prompt_id(row, form), prompt, row.without(form.prompt_field) | fields)


def _prompt_id(row: Row, form: PromptFormat) -> str:
    if form.id_field is None:
        value = row.values.get("id", row.name)
    else:
        value = row.column(form.id_field)
    if not isinstance(value, str | int) or isinstance(value, bool):
        column = form.id_field or "id"
        raise DataError(f"{row.place}: column {column!r} is {value!r}, expected a string or an integer")
    name = str(value)
    if any("\ud800" <= character <= "\udfff" for character in name):
        column = form.id_field or "id"
        raise DataError(f"{row.place}: column {column!r} is {name!r}, which is no valid Unicode: mend the id")
    return name


def read_unique_rows(
    path: str | Path,
    form: PromptFormat,
    required_fields: Mapping[str, Any] = MappingProxyType({}),
    max_rows: int | None = None,
) -> list[PromptRow]:
    """The first ``max_rows`` of ``read_prompt_rows`` (None: all); DataError for an id used twice, too."""
    rows: list[PromptRow] = []
    place_of_id: dict[str, str] = {}
    for row in islice(read_prompt_rows(path, form, required_fields), max_rows):
        if place_of_id.setdefault(row.prompt_id, row.place) != row.place:
            raise DataError(
                f"{row.place}: id {row.prompt_id!r} was used at {place_of_id[row.prompt_id]} already: ids "
                "must be unique, or left out (tools/prepare_data.py removes repeated problems)"
            )
        rows.append(row)
    return rows


def encode_rows(
    rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, form: PromptFormat
) -> list[Prompt]:
    """The tokenised prompt of every row, whatever its length.

    Raises DataError naming row and column for one that cannot be used, and ConfigError for a chat template
    that the tokenizer does not have.
    """
    if form.chat_template:
        check_chat_template(tokenizer)
    places = [row.place for row in rows]
    texts = [prompt_text(row.prompt, form, tokenizer, row.place) for row in rows]
    prompts = []
    for row, text, token_ids in zip(rows, texts, encode_texts(tokenizer, texts, places), strict=True):
        if not token_ids:
            raise DataError(f"{row.place}: column {form.prompt_field!r} has no tokens: write a prompt")
        prompts.append(Prompt(row.prompt_id, text, np.array(token_ids, dtype=np.int32), row.fields))
    return prompts


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    form: PromptFormat,
    max_length: int | None = None,
    required_fields: Mapping[str, Any] = MappingProxyType({}),
    max_rows: int | None = None,
) -> list[Prompt]:
    """Prompts of a data set, in its order.

    Prompts of more than ``max_length`` tokens are left out, and their number logged; ``max_rows`` reads the
    first so many rows. Raises DataError naming source, row and column for anything that cannot be used, and
    ConfigError for a chat template that the tokenizer does not have.
    """
    if form.chat_template:
        check_chat_template(tokenizer)  # before the rows are read, which may take long
    every_prompt = encode_rows(read_unique_rows(path, form, required_fields, max_rows), tokenizer, form)
    prompts = [p for p in every_prompt if max_length is None or len(p.token_ids) <= max_length]
    num_left_out = len(every_prompt) - len(prompts)
    if not prompts:
        raise DataError(
            f"{path}: all {num_left_out} prompts are longer than max_prompt_length={max_length} tokens: "
            "raise it"
        )
    if num_left_out:
        logger.warning(
            "%s: left out %d of %d prompts, longer than %s tokens",
            path,
            num_left_out,
            len(every_prompt),
            max_length,
        )
    return prompts


class PromptLoader:
    """Endless prompts, the same on every rank, resumable anywhere."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        mixture: Sequence[MixturePart] = (),
    ) -> None:
        """``mixture``: the sources that ``prompts`` consists of, in this order; none: every prompt once per
        epoch. Raises DataError where there are too few prompts for one batch.
        """
        if len(prompts) < prompts_per_step:
            raise DataError(
                f"the dataset has {len(prompts)} usable prompts, fewer than "
                f"data.prompts_per_step={prompts_per_step}: lower that, or add prompts"
            )
        self._prompts = prompts
        self._order: EpochOrder | MixtureOrder
        if mixture:
            assert sum(part.num_rows for part in mixture) == len(prompts)
            self._order = MixtureOrder(mixture, seed, shuffle)
        else:
            self._order = EpochOrder(len(prompts), seed, shuffle)

    @property
    def num_prompts(self) -> int:
        """Of one epoch."""
        return len(self._prompts)

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
                "(or data.sources) does not have: resume with the same data, or start anew with "
                "checkpoint.resume=never"
            )
        return [by_id[prompt_id] for prompt_id in prompt_ids]

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, as plain numbers."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises CheckpointError where data or seed are others."""
        self._order.load_state_dict(state)


def with_source_name(prompts: Sequence[Prompt], name: str) -> list[Prompt]:
    """The same prompts with ids that no other source has: ``name/id``."""
    return [replace(prompt, prompt_id=f"{name}/{prompt.prompt_id}") for prompt in prompts]
