"""Which samples the report shows: read line by line, chosen without looking at what they say, and cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from apo_megatron.errors import DataError
from apo_megatron.evaluation.report.folders import BenchmarkResult
from apo_megatron.evaluation.report.json_lines import read_json_lines
from apo_megatron.telemetry.page.document import embedded_json

MAX_SAMPLES = 8  # per problem and checkpoint
MAX_CHARACTERS = 4_000  # of a text
MAX_ANSWER_CHARACTERS = 300
# What is shown shrinks down this ladder, samples and characters, until it fits the room there is.
_LADDER = ((8, 4_000), (8, 2_000), (4, 2_000), (4, 1_000), (4, 500), (2, 500), (2, 250), (2, 100), (1, 100))
_VERDICTS = ("right", "wrong", "unjudged")


class _Generation(BaseModel):
    """A line of generations/<benchmark>/rank_*.jsonl."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    problem: str
    sample: int
    text: str
    finish_reason: str
    num_tokens: int | None
    reward: float | None
    answer: str | None = None


@dataclass(frozen=True)
class Sample:
    index: int  # 0 .. n - 1
    verdict: str  # right, wrong, unjudged
    text: str  # its first characters
    num_left_out: int  # characters after them
    answer: str | None
    is_truncated: bool  # the model was stopped at the largest length
    num_tokens: int | None

    def cut(self, num_characters: int) -> Sample:
        left_out = max(0, len(self.text) - num_characters)
        values = {**self.__dict__, "text": self.text[:num_characters]}
        return Sample(**{**values, "num_left_out": self.num_left_out + left_out})

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class ChosenSamples:
    """Of one checkpoint on one benchmark."""

    by_problem: list[list[Sample]]  # [P], each in the order of the samples
    num_shown: int  # at most, per problem
    num_characters: int  # at most, per text
    num_disagreeing: int  # problems where the files and results.json differ in the samples or the right ones


def choose_samples(folder: Path, result: BenchmarkResult, room: int) -> ChosenSamples:
    """At most 8 samples for each problem, right and wrong alike where there are both.

    The samples of a problem were drawn alike, so those with the lowest index are as good as any random ones,
    and the same whatever the order of the lines. Fewer and shorter ones are taken until their JSON fits into
    ``room`` bytes. Memory grows with the number of problems, not with that of samples. Raises DataError for
    a folder without files and for a broken line.
    """
    problems = {name: _Choice(result.num_samples) for name in result.prompt_ids}
    for generation in _read(folder, result):
        problems[generation.problem].add(generation)
    expected = dict(zip(result.prompt_ids, result.num_correct, strict=True))
    num_disagreeing = sum(
        (choice.num_seen, choice.num_right) != (result.num_samples, expected[name])
        for name, choice in problems.items()
    )
    for num_shown, num_characters in _LADDER:
        chosen = [
            [sample.cut(num_characters) for sample in problems[name].best(num_shown)]
            for name in result.prompt_ids
        ]
        if sum(len(embedded_json([s.to_json() for s in samples])) for samples in chosen) <= room:
            return ChosenSamples(chosen, num_shown, num_characters, num_disagreeing)
    return ChosenSamples([[] for _ in problems], 0, 0, num_disagreeing)


class _Choice:
    """The samples of one problem that may be shown, and what was counted of all."""

    def __init__(self, num_samples: int) -> None:
        self._is_seen = bytearray(num_samples)
        self._kept: dict[str, dict[int, Sample]] = {verdict: {} for verdict in _VERDICTS}
        self.num_right = 0

    @property
    def num_seen(self) -> int:
        return sum(self._is_seen)

    def add(self, generation: _Generation) -> None:
        if self._is_seen[generation.sample]:  # a run that went on may have drawn it again: the first counts
            return
        self._is_seen[generation.sample] = 1
        verdict = _verdict(generation.reward)
        self.num_right += verdict == "right"
        kept = self._kept[verdict]
        if len(kept) == MAX_SAMPLES:
            last = max(kept)
            if generation.sample > last:
                return
            del kept[last]
        answer = generation.answer
        kept[generation.sample] = Sample(
            index=generation.sample,
            verdict=verdict,
            text=generation.text[:MAX_CHARACTERS],
            num_left_out=max(0, len(generation.text) - MAX_CHARACTERS),
            answer=answer if answer is None else answer[:MAX_ANSWER_CHARACTERS],
            is_truncated=generation.finish_reason == "length",
            num_tokens=generation.num_tokens,
        )

    def best(self, num: int) -> list[Sample]:
        """``num`` of them: right, wrong, unjudged in turn, as long as there are some."""
        queues = [[kept[index] for index in sorted(kept)] for kept in self._kept.values()]
        turns = sorted(
            ((turn, place) for place, queue in enumerate(queues) for turn in range(len(queue))),
        )[:num]
        return sorted((queues[place][turn] for turn, place in turns), key=lambda sample: sample.index)


def _verdict(reward: float | None) -> str:
    if reward is None or reward != reward:  # NaN
        return "unjudged"
    return "right" if reward >= 1 else "wrong"


def _read(folder: Path, result: BenchmarkResult) -> Iterator[_Generation]:
    paths = sorted(folder.glob("rank_*.jsonl"))
    if not paths:
        raise DataError(f"{folder}: no files rank_*.jsonl, the samples of the evaluation")
    known = set(result.prompt_ids)
    rows = TypeAdapter(_Generation)
    for path in paths:
        for number, generation in read_json_lines(path, rows):
            if generation.problem not in known:
                raise DataError(
                    f"{path}, line {number}: problem {generation.problem!r} is not in results.json"
                )
            if generation.sample < result.num_samples:  # more may have been drawn than were evaluated
                yield generation
