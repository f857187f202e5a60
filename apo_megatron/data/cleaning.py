"""Cleans a data set row by row: repeated, contaminated and over-long prompts go, and are counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import xxhash
from transformers import PreTrainedTokenizerBase

from apo_megatron.config.data import PrepareConfig, PromptDataset, PromptFormat
from apo_megatron.data.chat import as_messages, check_chat_template, prompt_text
from apo_megatron.data.decontamination import NgramIndex, Overlap
from apo_megatron.data.prompts import PromptRow, read_prompt_rows
from apo_megatron.data.tokenizer import encode_texts
from apo_megatron.errors import DataError

NUM_EXAMPLES = 3  # of each kind, kept for the report
_ROWS_PER_CHUNK = 1024  # encoded together


@dataclass
class CleaningReport:
    """How many rows went, and why; each row is counted once. Examples: the first few of each kind."""

    num_rows: int = 0
    num_kept: int = 0
    num_duplicates: int = 0
    num_contradictions: int = 0  # duplicates with other fields (another answer) than the kept row
    num_too_long: int = 0
    num_contaminated: dict[str, int] = field(default_factory=dict)  # evaluation set -> rows
    contradictions: list[tuple[str, str]] = field(default_factory=list)  # places of duplicate and kept row
    overlaps: list[tuple[str, Overlap]] = field(default_factory=list)  # place of the row, what it shares


@dataclass(frozen=True)
class _Kept:
    place: str
    fields_digest: bytes


class Cleaner:
    """One pass over the rows of a data set."""

    def __init__(self, cfg: PrepareConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Reads the evaluation sets. Raises DataError and ConfigError for what cannot be used."""
        assert (tokenizer is None) == (cfg.max_prompt_length is None), "the config has a rule for this"
        if tokenizer is not None and cfg.source.chat_template:
            check_chat_template(tokenizer)
        self._cfg, self._tokenizer = cfg, tokenizer
        self._indices = [(_title(other), _ngram_index(other, cfg.ngram)) for other in cfg.against]
        self._seen: dict[bytes, _Kept] = {}  # by digest of the prompt: 16 bytes whatever its length
        self._place_of_id: dict[str, str] = {}
        self.report = CleaningReport(num_contaminated={name: 0 for name, _ in self._indices})

    def clean(self, rows: Iterable[PromptRow]) -> Iterator[PromptRow]:
        """The rows that stay, in their order. Raises DataError naming a row that cannot be used."""
        rows = iter(rows)
        while chunk := list(islice(rows, _ROWS_PER_CHUNK)):
            self.report.num_rows += len(chunk)
            new = [row for row in chunk if self._is_new(row) and not self._is_contaminated(row)]
            for row in self._short_enough(new):
                first = self._place_of_id.setdefault(row.prompt_id, row.place)
                if first != row.place:
                    raise DataError(
                        f"{row.place}: id {row.prompt_id!r} was used at {first} already, by another prompt: "
                        "ids must be unique; leave source.id_field out to number the rows"
                    )
                self.report.num_kept += 1
                yield row

    def _is_new(self, row: PromptRow) -> bool:
        messages = as_messages(row.prompt, self._cfg.source.prompt_field, row.place)
        key = _digest([[message["role"], " ".join(message["content"].split())] for message in messages])
        answer = _digest([row.fields[name] for name, _ in self._cfg.source.fields])
        kept = self._seen.setdefault(key, _Kept(row.place, answer))
        if kept.place == row.place:
            return True
        self.report.num_duplicates += 1
        if kept.fields_digest != answer:
            self.report.num_contradictions += 1
            if len(self.report.contradictions) < NUM_EXAMPLES:
                self.report.contradictions.append((row.place, kept.place))
        return False

    def _is_contaminated(self, row: PromptRow) -> bool:
        text = _problem_text(row, self._cfg.source)
        for name, index in self._indices:
            overlap = index.overlap(text)
            if overlap is not None:
                self.report.num_contaminated[name] += 1
                if len(self.report.overlaps) < NUM_EXAMPLES:
                    self.report.overlaps.append((row.place, overlap))
                return True
        return False

    def _short_enough(self, rows: Sequence[PromptRow]) -> Iterator[PromptRow]:
        limit = self._cfg.max_prompt_length
        if self._tokenizer is None or limit is None:
            yield from rows
            return
        texts = [prompt_text(row.prompt, self._cfg.source, self._tokenizer, row.place) for row in rows]
        encoded = encode_texts(self._tokenizer, texts, [row.place for row in rows])
        for row, token_ids in zip(rows, encoded, strict=True):
            if len(token_ids) <= limit:
                yield row
            else:
                self.report.num_too_long += 1


def _ngram_index(dataset: PromptDataset, n: int) -> NgramIndex:
    rows = list(read_prompt_rows(dataset.path, dataset))
    return NgramIndex([_problem_text(row, dataset) for row in rows], [row.place for row in rows], n)


def _problem_text(row: PromptRow, form: PromptFormat) -> str:
    """What the problem says: system messages are instructions."""
    messages = as_messages(row.prompt, form.prompt_field, row.place)
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _title(dataset: PromptDataset) -> str:
    parts = [part for part in (dataset.subset, dataset.split) if part is not None]
    return f"{dataset.path} ({', '.join(parts)})" if parts else dataset.path


def _digest(value: object) -> bytes:
    return xxhash.xxh3_128_digest(json.dumps(value, default=repr).encode())
