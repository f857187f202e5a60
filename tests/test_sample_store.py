"""Judged samples on disk: torn files, other settings, samples of other systems, units that are drawn once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from apo_megatron.config.evaluation import GenerationsConfig, MeasurementConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.errors import ConfigError, DataError, RolloutError
from apo_megatron.evaluation.drawing import draw_units, is_drawn, plan_units
from apo_megatron.evaluation.existing import Generations
from apo_megatron.evaluation.harness import evaluation_sampling
from apo_megatron.evaluation.result import JudgedSample, ProblemTally, make_result
from apo_megatron.evaluation.sample_store import SampleWriter, claim_folder, locked, pin_weights, read_samples
from apo_megatron.types import Completion, Prompt
from tests.test_evaluate import DigitReward, ScriptedEngine, make_prompts

SAMPLE = JudgedSample("p0", 0, "a\n\u2028\ud800\x00", "stop", 3, 1.0, "a")


def write(folder: Path, samples: Sequence[JudgedSample], rank: int = 0) -> Path:
    with SampleWriter(folder, rank) as writer:
        writer.write(samples)
    return folder / f"rank_{rank:05d}.jsonl"


def test_what_is_written_is_read_once(tmp_path: Path) -> None:
    unjudged = replace(SAMPLE, sample=1, reward=None, answer=None, num_tokens=None)
    write(tmp_path, [SAMPLE, unjudged])
    write(tmp_path, [replace(SAMPLE, text="drawn twice"), replace(SAMPLE, problem="p1")], rank=1)
    assert list(read_samples(tmp_path)) == [SAMPLE, unjudged, replace(SAMPLE, problem="p1")]


@pytest.mark.parametrize("size", [1, 10, 70_000])
def test_a_torn_line_is_passed_over_and_written_over(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, [SAMPLE])
    torn = json.dumps({"problem": "p1", "text": "x" * size})[: size + 5]
    with path.open("a") as file:
        file.write(torn)
    assert list(read_samples(tmp_path)) == [SAMPLE]
    write(tmp_path, [replace(SAMPLE, sample=1)])
    assert [sample.sample for sample in read_samples(tmp_path)] == [0, 1]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"problem": "p0"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, [SAMPLE])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"rank_00000\.jsonl:2: not a sample"):
        list(read_samples(tmp_path))


def test_samples_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    assert claim_folder(folder, {"seed": 1, "ids": (1, 2)}, 8) == [8]
    assert claim_folder(folder, {"seed": 1, "ids": (1, 2)}, 16) == [8, 16]
    assert claim_folder(folder, {"seed": 1, "ids": (1, 2)}, 4) == [4]
    with pytest.raises(DataError, match=r"samples: has samples of other settings \(seed: 1 there, 2 now\)"):
        claim_folder(folder, {"seed": 2, "ids": (1, 2)}, 8)
    pin_weights(folder, "served-a")
    pin_weights(folder, "served-a")
    with pytest.raises(DataError, match="weights of the servers: served-a there, served-b now"):
        pin_weights(folder, "served-b")
    assert claim_folder(folder, {"seed": 1, "ids": (1, 2)}, 32) == [8, 16, 32]
    (folder / "settings.json").unlink()
    write(folder, [SAMPLE])
    with pytest.raises(DataError, match=r"has samples, but no settings\.json"):
        claim_folder(folder, {"seed": 1}, 8)


def test_two_evaluations_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):
        with pytest.raises(ConfigError, match="another evaluation is writing there"):
            with locked(tmp_path / "out"):
                pass
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("num_samples", "unit_size", "sizes"),
    [(3, 7, [6, 6, 3]), (3, 1, [1] * 15), (5, 4, [4, 1] * 5), (2, 100, [10])],
)
def test_units_hold_every_sample_once(num_samples: int, unit_size: int, sizes: list[int]) -> None:
    units = plan_units(make_prompts(5), range(num_samples), unit_size)
    assert [sum(request.num_samples for request in unit) for unit in units] == sizes
    drawn = [
        (request.prompt.prompt_id, number)
        for unit in units
        for request in unit
        for number in range(request.first, request.first + request.num_samples)
    ]
    assert sorted(drawn) == [(f"p{i}", number) for i in range(5) for number in range(num_samples)]


def test_a_unit_is_drawn_with_its_last_sample() -> None:
    [unit] = plan_units(make_prompts(2), range(2), 4)
    assert not is_drawn(unit, {"p0": {0, 1}, "p1": {1}})
    assert is_drawn(unit, {"p0": {0, 1, 2}, "p1": {0, 1}})


class _SlowEngine(ScriptedEngine):
    """Each generation is done after as many looks as there are earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.max_running = self.num_running = 0

    def start(self, requests: Any, sampling: Any, progress: Any = None) -> Any:
        answers = [
            [self._completion(request.prompt, request.first + i) for i in range(request.num_samples)]
            for request in requests
        ]
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        return _SlowGeneration(self, answers, looks=len(answers) % 3)


class _SlowGeneration:
    def __init__(self, engine: _SlowEngine, answers: list[list[Completion]], looks: int) -> None:
        self._engine, self._answers, self._looks = engine, answers, looks

    def wait(self, seconds: float) -> bool:
        if self._engine.failure is not None:
            raise RolloutError(self._engine.failure)
        self._looks -= 1
        if self._looks < 0:
            self._engine.num_running -= 1
        return self._looks < 0

    def num_finished(self) -> int:
        return 0

    def stop(self) -> None: ...

    def results(self) -> list[list[Completion]]:
        return self._answers


def draw(folder: Path, engine: _SlowEngine, prompts: list[Prompt], num_samples: int, size: int) -> None:
    drawn: dict[str, set[int]] = {}
    for sample in read_samples(folder):
        drawn.setdefault(sample.problem, set()).add(sample.sample)
    units = [unit for unit in plan_units(prompts, range(num_samples), size) if not is_drawn(unit, drawn)]
    sampling = evaluation_sampling(MeasurementConfig(), RolloutConfig(), num_samples)
    with SampleWriter(folder, 0) as writer:
        draw_units(
            engine, units, sampling, DigitReward(), writer, 3, lambda: True, lambda samples, tokens: None
        )


def test_what_is_drawn_is_judged_and_kept_when_the_engine_fails(tmp_path: Path) -> None:
    engine, prompts = _SlowEngine(), make_prompts(5)
    draw(tmp_path, engine, prompts[:3], 8, 5)
    assert engine.max_running == 3
    engine.failure = "the server is gone"
    with pytest.raises(RolloutError, match="gone"):
        draw(tmp_path, engine, prompts, 8, 5)
    engine = _SlowEngine()
    draw(tmp_path, engine, prompts, 8, 5)

    samples = list(read_samples(tmp_path))
    assert sorted((s.problem, s.sample) for s in samples) == [
        (f"p{i}", s) for i in range(5) for s in range(8)
    ]
    by_place = {(s.problem, s.sample): s for s in samples}
    assert by_place["p2", 1] == JudgedSample("p2", 1, " 3 ", "stop", 2, 1.0, None)
    assert by_place["p0", 5].reward is None and by_place["p0", 3].finish_reason == "length"


# Generations of other systems


def generations(
    path: Path, has_others: bool = False, columns: Mapping[str, str] | None = None
) -> Generations:
    cfg = GenerationsConfig(path=str(path), **(columns or {}))
    return Generations(cfg, make_prompts(2), num_samples=2, has_others=has_others)


def judged(folder: Path, source: Generations) -> list[JudgedSample]:
    folder.mkdir(exist_ok=True)
    source.check()
    drawn: dict[str, set[int]] = {}
    for sample in read_samples(folder):
        drawn.setdefault(sample.problem, set()).add(sample.sample)
    with SampleWriter(folder, 0) as writer:
        source.judge(DigitReward(), writer, drawn, lambda samples, tokens: None)
    return sorted(read_samples(folder), key=lambda sample: (sample.problem, sample.sample))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPECTED = [
    JudgedSample("p0", 0, "3", "stop", 1, 1.0, None),
    JudgedSample("p0", 1, "9", "length", 2, 0.0, None),
    JudgedSample("p1", 0, "5", "stop", 3, None, None),
    JudgedSample("p1", 1, "4", "stop", None, 1.0, None),
]


def test_a_row_a_sample_a_row_a_problem_and_parquet_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"id": s.problem, "response": s.text, "finish_reason": s.finish_reason, "num_tokens": s.num_tokens}
        for s in EXPECTED
    ]
    flat = write_rows(tmp_path / "flat.jsonl", [rows[2], rows[0], rows[3], rows[1]])
    columns = {"problem_field": "id", "text_field": "response"}
    assert judged(tmp_path / "a", generations(flat, columns=columns)) == EXPECTED
    lists = [
        {"id": rows[i]["id"], **{name: [rows[i][name], rows[i + 1][name]] for name in list(rows[0])[1:]}}
        for i in (0, 2)
    ]
    grouped = write_rows(tmp_path / "grouped.jsonl", lists)
    assert judged(tmp_path / "b", generations(grouped, columns=columns)) == EXPECTED
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert judged(tmp_path / "c", generations(tmp_path / "rows.parquet", columns=columns)) == EXPECTED


def test_the_folder_of_an_evaluation_can_be_judged_again(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", EXPECTED[:3])
    write(tmp_path / "old", EXPECTED[3:], rank=1)
    assert judged(tmp_path / "new", generations(tmp_path / "old")) == EXPECTED
    before = (tmp_path / "new" / "rank_00000.jsonl").read_bytes()
    assert judged(tmp_path / "new", generations(tmp_path / "old")) == EXPECTED
    assert (tmp_path / "new" / "rank_00000.jsonl").read_bytes() == before  # nothing is judged twice


def test_repeated_and_torn_lines_of_an_evaluation_are_not_more_samples(tmp_path: Path) -> None:
    claim_folder(tmp_path / "old", {}, 2)
    write(tmp_path / "old", [EXPECTED[0], EXPECTED[0], EXPECTED[2]])
    path = write(tmp_path / "old", [EXPECTED[1], EXPECTED[3]], rank=1)
    with path.open("a") as file:
        file.write('{"problem": "p')
    assert judged(tmp_path / "new", generations(tmp_path / "old")) == EXPECTED


def test_other_ways_to_say_the_same(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "p0", "text": "3", "finish_reason": {"type": "stop", "matched": 1}, "num_tokens": 1.0},
        {"problem": "p0", "text": "9", "finish_reason": {"type": "length"}, "num_tokens": 2},
        {"problem": "p1", "text": "5", "finish_reason": None, "num_tokens": 3},
        {"problem": "p1", "text": "4", "num_tokens": math.nan},
    ]
    source = generations(write_rows(tmp_path / "x.jsonl", rows))
    assert judged(tmp_path / "new", source) == EXPECTED


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "p0", "text": "3"}] * 2, r"num_samples=2 .*'p1' has 0"),
        ([{"problem": "p7", "text": "3"}], r"x.jsonl:1: column 'problem' is 'p7', which is no problem"),
        ([{"problem": "p0", "answer": "3"}], r"x.jsonl:1: column 'text' is missing"),
        ([{"problem": "p0", "text": [3]}], r"x.jsonl:1: item 0 of column 'text' is an integer"),
        ([{"problem": "p0", "text": ["3"], "num_tokens": 4}], r"x.jsonl:1: column 'num_tokens' .*list of 1"),
        ([{"problem": "p0", "text": "3", "num_tokens": "4"}], r"x.jsonl:1: column 'num_tokens' is a string"),
        ([{"problem": "p0", "text": "3", "num_tokens": 10**15}], r"x.jsonl:1: column 'num_tokens' is an int"),
        (
            [{"problem": "p0", "text": "3", "finish_reason": 1}],
            r"x.jsonl:1: column 'finish_reason' is an int",
        ),
    ],
)
def test_what_cannot_be_judged_is_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        generations(write_rows(tmp_path / "x.jsonl", rows)).check()


def test_rows_of_problems_that_were_left_out_are_passed_over(tmp_path: Path) -> None:
    rows = [{"problem": name, "text": "3"} for name in ("p0", "p1", "p7", "p0", "p1", "p1")]
    source = generations(write_rows(tmp_path / "x.jsonl", rows), has_others=True)
    assert [(s.problem, s.sample) for s in judged(tmp_path / "new", source)] == [
        (s.problem, s.sample) for s in EXPECTED
    ]


# What the samples say


def test_a_result_counts_votes_answers_and_what_is_not_known() -> None:
    cfg = MeasurementConfig(num_samples=4, ks=(1, 2, 4), bootstrap_samples=10)
    verdicts: list[tuple[str | None, float | None]] = [("a", 1.0), ("b", 0.0), (None, None), ("a", 1.0)]
    tallies = [ProblemTally(), ProblemTally()]
    for i, (answer, reward) in enumerate(verdicts):
        tallies[0].add(JudgedSample("p", i, f"text {i}", "stop", 2, reward, answer), has_answers=True)
        tallies[1].add(JudgedSample("q", i, "x", "length", None, 0.0, "x" * 300), has_answers=True)
    result = make_result(["p", "q"], tallies, 4, cfg, 0, has_answers=True)
    assert result.num_correct == (2, 0) and result.num_distinct_correct == (1, 0)
    # Two of a, a, b and no answer: one pair of a, two ties, two with one vote for a, one for b alone.
    assert result.majority_at_k == pytest.approx({1: 0.25, 2: (1 + 2 / 2 + 2) / 6 / 2, 4: 0.5})
    assert result.mean_response_length is None
    assert (result.truncation_rate, result.verifier_failures) == (0.5, 1)
    assert math.isclose(result.verifier_failure_rate, 1 / 8)
