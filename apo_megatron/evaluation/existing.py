"""Generations of any system, read from files and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apo_megatron.config.evaluation import GenerationsConfig
from apo_megatron.data.jsonl import read_jsonl
from apo_megatron.data.rows import Row, describe
from apo_megatron.data.sources import read_source
from apo_megatron.errors import DataError
from apo_megatron.evaluation.judging import judge
from apo_megatron.evaluation.sample_store import SampleWriter
from apo_megatron.rewards.interface import Reward
from apo_megatron.rollout.engine import SampleRequest
from apo_megatron.types import Completion, Prompt

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
        requests: list[SampleRequest] = []
        completions: list[list[Completion]] = []

        def finish() -> None:
            samples = [sample for one in judge(reward, requests, completions) for sample in one]
            writer.write(samples)
            progress(len(samples), sum(sample.num_tokens or 0 for sample in samples))
            requests.clear()
            completions.clear()

        for prompt, number, completion in self._samples():
            if number in drawn.get(prompt.prompt_id, ()):
                continue
            requests.append(SampleRequest(prompt, 1, first=number))
            completions.append([completion])
            if len(requests) == _SAMPLES_PER_BATCH:
                finish()
        if requests:
            finish()

    def _samples(self) -> Iterator[tuple[Prompt, int, Completion]]:
        """(problem, number of the sample among the problem's, completion), in the order of the rows."""
        by_id = {prompt.prompt_id: prompt for prompt in self.prompts}
        counts: Counter[str] = Counter()
        for row in self._rows():
            name = str(row.column(self.cfg.problem_field, str | int, meaning="problem"))
            if name not in by_id:
                if self.has_others:
                    continue
                raise DataError(
                    f"{row.place}: column {self.cfg.problem_field!r} is {name!r}, which is no problem of the "
                    f"benchmark: its ids are {next(iter(by_id))!r}, ... ({len(by_id)} in all)"
                )
            for completion in self._completions(row):
                if counts[name] < self.num_samples:
                    yield by_id[name], counts[name], completion
                counts[name] += 1

    def _rows(self) -> Iterator[Row]:
        folder = Path(self.cfg.path)
        if not folder.is_dir():
            yield from read_source(folder)
            return
        paths = sorted(folder.glob("*.jsonl"))
        if not paths:
            raise DataError(f"{folder}: holds no *.jsonl files: name the folder or file with the generations")
        for path in paths:
            yield from read_jsonl(path)

    def _completions(self, row: Row) -> Iterator[Completion]:
        text = row.column(self.cfg.text_field, str | list, meaning="text")
        texts = text if isinstance(text, list) else [text]
        reasons = self._beside(row, self.cfg.finish_field, text, len(texts))
        lengths = self._beside(row, self.cfg.num_tokens_field, text, len(texts))
        for i, (one, reason, length) in enumerate(zip(texts, reasons, lengths, strict=True)):
            if not isinstance(one, str):
                raise DataError(
                    f"{row.place}: item {i} of column {self.cfg.text_field!r} is {describe(one)}, expected a "
                    "string"
                )
            if length is not None and (not isinstance(length, int) or length < 0):
                raise DataError(
                    f"{row.place}: column {self.cfg.num_tokens_field!r} is {describe(length)}, expected a "
                    "number of tokens"
                )
            num_tokens = length or 0
            yield Completion(
                token_ids=np.zeros(num_tokens, np.int32),  # a reward sees the length, not the tokens
                log_probs=np.zeros(num_tokens, np.float32),
                text=one,
                finish_reason="length" if reason == "length" else "stop",
                versions=((0, num_tokens),),
            )

    def _beside(self, row: Row, column: str, text: object, num: int) -> list[object]:
        """What an optional column says of each text of the row."""
        value = row.values.get(column)
        if not isinstance(text, list) or value is None:
            return [value] * num
        if not isinstance(value, list) or len(value) != num:
            raise DataError(
                f"{row.place}: column {column!r} is {describe(value)}, expected a list of {num}, one for "
                f"each of {self.cfg.text_field!r}"
            )
        return value
