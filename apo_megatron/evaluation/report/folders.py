"""The folder that one evaluation leaves: results.json, problems/ and settings.json, read and checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from apo_megatron.errors import DataError
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import pass_at_k
from apo_megatron.evaluation.report.json_lines import first_problem, parse_json, read_json_lines

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
_NUM_NAMED = 3  # problems that a message names
_NUM_RESAMPLES = 10_000  # for the intervals that results.json lacks


class BenchmarkResult(BaseModel):
    """What one evaluation measured on one benchmark; docs/evaluation.md says what the numbers mean."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    prompt_ids: Annotated[tuple[str, ...], Field(min_length=1)]  # [P]
    num_samples: Positive  # n, per problem
    num_correct: tuple[Count, ...]  # [P]
    pass_at_k: Annotated[dict[Positive, Share], Field(min_length=1)]  # mean over problems
    ci95: dict[Positive, tuple[float, float]]
    majority_at_k: dict[Positive, Share] = {}
    majority_ci95: dict[Positive, tuple[float, float]] = {}
    mean_response_length: Annotated[float, Field(ge=0)] | None  # tokens; None where it is not known
    truncation_rate: Share
    distinct_correct: Annotated[float, Field(ge=0)]  # different right answers per problem, mean
    verifier_failures: Count  # samples that could not be judged
    policy_version: int

    @model_validator(mode="after")
    def _fits_together(self) -> BenchmarkResult:
        if len(self.prompt_ids) != len(self.num_correct):
            raise ValueError(f"{len(self.prompt_ids)} prompt_ids, but {len(self.num_correct)} num_correct")
        repeated = [name for name, times in Counter(self.prompt_ids).items() if times > 1]
        if repeated:
            raise ValueError(f"problems stand twice in prompt_ids: {_named(repeated)}")
        if max(self.num_correct) > self.num_samples:
            raise ValueError(f"num_correct of {max(self.num_correct)} with num_samples {self.num_samples}")
        if max(self.pass_at_k) > self.num_samples:
            raise ValueError(f"pass_at_k with K = {max(self.pass_at_k)} from {self.num_samples} samples")
        for values, intervals in (
            (self.pass_at_k, self.ci95),
            (self.majority_at_k, self.majority_ci95),
        ):
            if values.keys() != intervals.keys():
                raise ValueError(f"values at K = {sorted(values)}, but intervals at {sorted(intervals)}")
        return self

    @property
    def ks(self) -> list[int]:
        """K of Pass@K, ascending."""
        return sorted(self.pass_at_k)

    def with_ks(self, ks: Iterable[int]) -> BenchmarkResult:
        """Pass@K at ``ks`` too, each at most n: exact from the counts, with its bootstrap interval."""
        added = sorted(set(ks) - self.pass_at_k.keys())
        if not added:
            return self
        curves = np.asarray(pass_at_k(self.num_samples, np.array(self.num_correct)[:, None], added))  # [P, K]
        intervals = bootstrap_interval(curves, _NUM_RESAMPLES, seed=0).tolist()
        values = dict(zip(added, curves.mean(axis=0).tolist(), strict=True))
        bounds = {k: (low, high) for k, (low, high) in zip(added, intervals, strict=True)}
        return self.model_copy(update={"pass_at_k": self.pass_at_k | values, "ci95": self.ci95 | bounds})


class Problem(BaseModel):
    """A line of problems/<benchmark>.jsonl."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    problem: str
    prompt: str
    gold: str | None = None


class _Settings(BaseModel):
    """generations/<benchmark>/settings.json."""

    settings: dict[str, Any]


class _Results(BaseModel):
    label: str
    benchmarks: Annotated[dict[str, BenchmarkResult], Field(min_length=1)]


@dataclass(frozen=True)
class Evaluation:
    """results.json of one folder. Labels are unique among the evaluations that are read together."""

    folder: Path
    label: str
    benchmarks: Mapping[str, BenchmarkResult]

    @property
    def results_path(self) -> Path:
        return self.folder / "results.json"

    def generations(self, benchmark: str) -> Path:
        """The folder with a file of samples per rank."""
        return self.folder / "generations" / benchmark

    def settings(self, benchmark: str) -> dict[str, Any] | None:
        """What samples and verdicts depended on, by name; None where it was not recorded."""
        path = self.generations(benchmark) / "settings.json"
        try:
            return _Settings.model_validate(parse_json(path.read_bytes())).settings
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except ValidationError as error:
            raise DataError(f"{path}: {first_problem(error)}") from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error})") from error

    def problems(self, benchmark: str) -> dict[str, Problem]:
        """By id. Raises DataError where they are not the problems of results.json."""
        path = self.folder / "problems" / f"{benchmark}.jsonl"
        found = {row.problem: row for _, row in read_json_lines(path, TypeAdapter(Problem))}
        missing = [name for name in self.benchmarks[benchmark].prompt_ids if name not in found]
        if missing:
            raise DataError(
                f"{path}: {_named(missing)} of {self.results_path} not found: the two files are not of the "
                "same evaluation"
            )
        return found


def read_evaluations(folders: Sequence[Path]) -> list[Evaluation]:
    """In the order given, with the problems of each shared benchmark in the order of the first.

    Each of these benchmarks has Pass@K at the same K: 1, and all that one of the evaluations names.

    Raises DataError for a file that is missing or broken, and for problems or numbers of samples that differ
    between two folders: these cannot be compared.
    """
    assert folders, "a report is about at least one evaluation"
    first, *others = _with_unique_labels([_read(Path(folder)) for folder in folders])
    shared = shared_benchmarks([first, *others])
    for other in others:
        for name in shared:
            _check_comparable(name, first, other)
    return _with_the_same_ks([first, *(_in_order_of(first, other, shared) for other in others)], shared)


def shared_benchmarks(evaluations: Sequence[Evaluation]) -> list[str]:
    """Those that all have, in the order of the first. Raises DataError where there is none."""
    shared = [name for name in evaluations[0].benchmarks if all(name in e.benchmarks for e in evaluations)]
    if not shared:
        found = "; ".join(f"{e.results_path}: {', '.join(e.benchmarks)}" for e in evaluations)
        raise DataError(f"no benchmark that all evaluations have. {found}")
    return shared


def _read(folder: Path) -> Evaluation:
    path = folder / "results.json"
    try:
        results = _Results.model_validate(parse_json(path.read_bytes()))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; name the folder of a finished evaluation (an unfinished one goes on "
            "where it stopped when it is started again)"
        ) from error
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for name in results.benchmarks:
        if name in ("", "..") or Path(name).name != name or "\0" in name:  # it becomes part of a path
            raise DataError(f"{path}: {name!r} cannot be the name of a benchmark, which is a file's name too")
    return Evaluation(folder, results.label, results.benchmarks)


def _with_unique_labels(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    times = Counter(evaluation.label for evaluation in evaluations)
    return [
        replace(evaluation, label=f"{evaluation.label} #{place}")
        if times[evaluation.label] > 1
        else evaluation
        for place, evaluation in enumerate(evaluations, 1)
    ]


def _check_comparable(benchmark: str, first: Evaluation, other: Evaluation) -> None:
    ours, theirs = first.benchmarks[benchmark], other.benchmarks[benchmark]
    where = f"{other.results_path}: {benchmark}"
    if ours.num_samples != theirs.num_samples:
        raise DataError(
            f"{where} has {theirs.num_samples} samples per problem, {first.results_path} {ours.num_samples}: "
            "the one with more solves more problems by that alone; evaluate both with the same number"
        )
    missing = [name for name in ours.prompt_ids if name not in set(theirs.prompt_ids)]
    added = [name for name in theirs.prompt_ids if name not in set(ours.prompt_ids)]
    if missing or added:
        found = [f"{verb} {_named(names)}" for verb, names in (("lacks", missing), ("adds", added)) if names]
        raise DataError(
            f"{where} is not about the same problems as {first.results_path}: it {' and '.join(found)}"
        )


def _in_order_of(first: Evaluation, other: Evaluation, shared: Sequence[str]) -> Evaluation:
    benchmarks = dict(other.benchmarks)
    for name in shared:
        ids, result = first.benchmarks[name].prompt_ids, other.benchmarks[name]
        correct = dict(zip(result.prompt_ids, result.num_correct, strict=True))
        ordered = {"prompt_ids": ids, "num_correct": tuple(correct[prompt_id] for prompt_id in ids)}
        benchmarks[name] = result.model_copy(update=ordered)
    return replace(other, benchmarks=benchmarks)


def _with_the_same_ks(evaluations: Sequence[Evaluation], shared: Sequence[str]) -> list[Evaluation]:
    ks = {name: {1}.union(*(e.benchmarks[name].pass_at_k for e in evaluations)) for name in shared}
    return [
        replace(
            e, benchmarks={**e.benchmarks, **{name: e.benchmarks[name].with_ks(ks[name]) for name in shared}}
        )
        for e in evaluations
    ]


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NUM_NAMED])
    return shown + (f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else "")
