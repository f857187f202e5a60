"""Generations of any system, read from files and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from apo_megatron.config.evaluation import GenerationsConfig
from apo_megatron.data.jsonl import read_jsonl
from apo_megatron.data.rows import Row, describe
from apo_megatron.data.sources import read_source
from apo_megatron.errors import DataError
from apo_megatron.evaluation.judging import judge
from apo_megatron.evaluation.sample_store import SETTINGS_FILE, SampleWriter, read_samples
from apo_megatron.rewards.interface import Reward
from apo_megatron.rollout.engine import SampleRequest
from apo_megatron.types import Completion, Prompt

_CUT = ("length", "max_tokens", "max_length")  # reasons of answers that ended at the limit
_MAX_TOKENS = 10_000_000
_SAMPLES_PER_BATCH = 256  # judged, then written
_NUM_NAMED = 3  # problems that a message names


@dataclass(frozen=True)
class Generations:
    """Rows with samples of ``prompts``, the first ``num_samples`` of each problem.

    ``has_others``: rows of other problems are passed over; else they are an error.
    """

    cfg: GenerationsConfig
    prompts: Sequence[Prompt]
    num_samples: int
    has_others: bool

    def check(self) -> None:
        """Raises DataError, naming file, row and column, unless each problem has enough samples."""
        counts = Counter(prompt.prompt_id for prompt, _, _ in self._samples())
        short = [p.prompt_id for p in self.prompts if counts[p.prompt_id] < self.num_samples]
        if short:
            shown = ", ".join(f"{name!r} has {counts[name]}" for name in short[:_NUM_NAMED])
            more = f" and {len(short) - _NUM_NAMED} more" if len(short) > _NUM_NAMED else ""
            raise DataError(
                f"{self.cfg.path}: evaluation.num_samples={self.num_samples} samples are wanted of each "
                f"problem, but {shown}{more}: lower evaluation.num_samples (and ks), or add the missing ones"
            )

    def judge(
        self,
        reward: Reward,
        writer: SampleWriter,
        drawn: Mapping[str, set[int]],
        progress: Callable[[int, int], None],
    ) -> None:
        """Judge and write what is not among ``drawn``: prompt id -> numbers of samples.

        ``progress`` hears of samples and tokens. Raises as ``check``, and as the reward does.
        """
        waiting: list[tuple[SampleRequest, _Answer]] = []

        def finish() -> None:
            requests = [request for request, _ in waiting]
            judged = judge(reward, requests, [[answer.completion()] for _, answer in waiting])
            samples = [
                replace(sample, num_tokens=answer.num_tokens)
                for [sample], (_, answer) in zip(judged, waiting, strict=True)
            ]
            writer.write(samples)
            progress(len(samples), sum(sample.num_tokens or 0 for sample in samples))
            waiting.clear()

        for prompt, number, answer in self._samples():
            if number not in drawn.get(prompt.prompt_id, ()):
                waiting.append((SampleRequest(prompt, 1, first=number), answer))
            if len(waiting) == _SAMPLES_PER_BATCH:
                finish()
        if waiting:
            finish()

    def _samples(self) -> Iterator[tuple[Prompt, int, _Answer]]:
        """(problem, number of the sample among the problem's, answer), in the order of the rows."""
        by_id = {prompt.prompt_id: prompt for prompt in self.prompts}
        counts: Counter[str] = Counter()
        for place, name, number, answer in self._answers():
            if name in by_id:
                number = counts[name] if number is None else number
                counts[name] += 1
                if number < self.num_samples:
                    yield by_id[name], number, answer
            elif not self.has_others:
                raise DataError(
                    f"{place}: column {self.cfg.problem_field!r} is {name!r}, which is no problem of the "
                    f"benchmark: its ids are {next(iter(by_id))!r}, ... ({len(by_id)} in all)"
                )

    def _answers(self) -> Iterator[tuple[str, str, int | None, _Answer]]:
        """(place, problem's id, number of the sample where it has one, answer)."""
        path = Path(self.cfg.path)
        if (path / SETTINGS_FILE).exists():  # an evaluation's own: torn and repeated lines are known there
            for sample in read_samples(path):
                answer = _Answer(sample.text, sample.finish_reason == "length", sample.num_tokens)
                yield str(path), sample.problem, sample.sample, answer
            return
        for row in _rows(path):
            name = str(row.column(self.cfg.problem_field, str | int, meaning="problem"))
            for answer in _row_answers(row, self.cfg):
                yield row.place, name, None, answer


@dataclass(frozen=True)
class _Answer:
    text: str
    is_cut: bool
    num_tokens: int | None

    def completion(self) -> Completion:
        """As a reward sees it: with its length, without its tokens."""
        num_tokens = self.num_tokens or 0
        return Completion(
            token_ids=np.zeros(num_tokens, np.int32),
            log_probs=np.zeros(num_tokens, np.float32),
            text=self.text,
            finish_reason="length" if self.is_cut else "stop",
            versions=((0, num_tokens),),
        )


def _rows(path: Path) -> Iterator[Row]:
    if not path.is_dir():
        yield from read_source(path)
        return
    paths = sorted(path.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{path}: holds no *.jsonl files: name the folder or file with the generations")
    for file in paths:
        yield from read_jsonl(file)


def _row_answers(row: Row, cfg: GenerationsConfig) -> Iterator[_Answer]:
    value = row.column(cfg.text_field, str | list, meaning="text")
    texts = value if isinstance(value, list) else [value]
    reasons = _beside(row, cfg.finish_field, texts, value)
    lengths = _beside(row, cfg.num_tokens_field, texts, value)
    for i, (text, reason, length) in enumerate(zip(texts, reasons, lengths, strict=True)):
        if not isinstance(text, str):
            raise DataError(
                f"{row.place}: item {i} of column {cfg.text_field!r} is {describe(text)}, expected a string"
            )
        yield _Answer(
            text, _is_cut(row, cfg.finish_field, reason), _length(row, cfg.num_tokens_field, length)
        )


def _beside(row: Row, column: str, texts: Sequence[Any], text: Any) -> Sequence[Any]:
    """What an optional column says of each text of the row."""
    value = row.values.get(column)
    if value is None or text is not texts:
        return [value] * len(texts)
    if not isinstance(value, list) or len(value) != len(texts):
        raise DataError(
            f"{row.place}: column {column!r} is {describe(value)}, expected a list of {len(texts)}, one for "
            "each text"
        )
    return value


def _is_cut(row: Row, column: str, reason: Any) -> bool:
    """Whether an answer ended at the limit: SGLang, vLLM and others say "length", some in an object."""
    if isinstance(reason, Mapping):
        reason = reason.get("type")
    if reason is not None and not isinstance(reason, str):
        raise DataError(
            f"{row.place}: column {column!r} is {describe(reason)}, expected text such as stop or length, or "
            "null"
        )
    return reason in _CUT


def _length(row: Row, column: str, length: Any) -> int | None:
    """Tokens of an answer; columns with gaps hold numbers like 3.0, and NaN."""
    if length is None or length != length:
        return None
    if not isinstance(length, int | float) or length != int(length) or not 0 <= length <= _MAX_TOKENS:
        raise DataError(
            f"{row.place}: column {column!r} is {describe(length)}, expected a number of tokens, at most "
            f"{_MAX_TOKENS}"
        )
    return int(length)
