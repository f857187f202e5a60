"""What an evaluation measured: from judged samples to counts, from counts to Pass@K and its neighbours."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from apo_megatron.config.evaluation import MeasurementConfig
from apo_megatron.evaluation.answers import majority_at_k
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import Floats, pass_at_k

_MAX_ANSWER = 200  # characters; a longer answer is known by its digest


@dataclass(frozen=True)
class PassAtKResult:
    """What one evaluation measured. Per-problem fields are in the order of the problems, length P."""

    prompt_ids: tuple[str, ...]  # [P]
    num_samples: int  # n, per problem
    num_correct: tuple[int, ...]  # [P], c of each problem
    num_distinct_correct: tuple[int, ...]  # [P], different right answers
    pass_at_k: dict[int, float]  # K -> mean over problems, in [0, 1]
    ci95: dict[int, tuple[float, float]]  # K -> 95 % bootstrap interval over problems
    majority_at_k: dict[int, float]  # K -> mean over problems; {} where the reward extracts no answers
    majority_ci95: dict[int, tuple[float, float]]
    mean_response_length: float | None  # tokens, the stop token included; None where it is not known
    truncation_rate: float  # share of samples that ended at max_new_tokens
    distinct_correct: float  # mean of num_distinct_correct
    verifier_failures: int  # samples that could not be judged; counted as wrong
    policy_version: int  # weights that were evaluated

    @property
    def verifier_failure_rate(self) -> float:
        """``verifier_failures`` as a share of all samples."""
        return self.verifier_failures / (self.num_samples * len(self.num_correct))

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``; K becomes a string."""
        values = asdict(self)
        for name in ("prompt_ids", "num_correct", "num_distinct_correct"):
            values[name] = list(values[name])
        for name in ("pass_at_k", "majority_at_k"):
            values[name] = {str(k): value for k, value in values[name].items()}
        for name in ("ci95", "majority_ci95"):
            values[name] = {str(k): list(interval) for k, interval in values[name].items()}
        return values

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> PassAtKResult:
        """The result that ``to_json`` wrote; other keys are left alone."""
        fields = {name: values[name] for name in PassAtKResult.__dataclass_fields__}
        for name in ("prompt_ids", "num_correct", "num_distinct_correct"):
            fields[name] = tuple(fields[name])
        for name in ("pass_at_k", "majority_at_k"):
            fields[name] = {int(k): value for k, value in fields[name].items()}
        for name in ("ci95", "majority_ci95"):
            fields[name] = {int(k): (low, high) for k, (low, high) in fields[name].items()}
        return PassAtKResult(**fields)


@dataclass(frozen=True)
class JudgedSample:
    """One sample of one problem, with its verdict."""

    problem: str  # prompt id
    sample: int  # 0..n-1
    text: str
    finish_reason: str  # "stop", or "length": cut at max_new_tokens
    num_tokens: int | None  # the stop token included; None where it is not known
    reward: float | None  # at least 1: right; None: could not be judged
    answer: str | None  # what votes for the majority; None: no answer


@dataclass
class ProblemTally:
    """What is kept of the samples of one problem: nothing that grows with their length."""

    num_samples: int = 0
    num_unjudged: int = 0
    num_truncated: int = 0
    num_tokens: int | None = 0
    right: Counter[str | None] = field(default_factory=Counter)  # answer -> samples that gave it
    wrong: Counter[str | None] = field(default_factory=Counter)

    @property
    def num_correct(self) -> int:
        return sum(self.right.values())

    def add(self, sample: JudgedSample, has_answers: bool) -> None:
        """Count one sample. Without answers its text tells it from others."""
        self.num_samples += 1
        self.num_unjudged += sample.reward is None
        self.num_truncated += sample.finish_reason == "length"
        if self.num_tokens is not None:
            self.num_tokens = None if sample.num_tokens is None else self.num_tokens + sample.num_tokens
        if sample.reward is not None and sample.reward >= 1:
            self.right[_short(sample.answer if has_answers else sample.text.strip())] += 1
        elif has_answers:
            self.wrong[_short(sample.answer)] += 1


def _short(answer: str | None) -> str | None:
    if answer is None or len(answer) <= _MAX_ANSWER:
        return answer
    return hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def make_result(
    prompt_ids: Sequence[str],
    tallies: Sequence[ProblemTally],
    num_samples: int,
    cfg: MeasurementConfig,
    policy_version: int,
    has_answers: bool,
) -> PassAtKResult:
    """The result of ``num_samples`` samples for each problem; K of ``cfg`` above it are left out."""
    assert all(tally.num_samples == num_samples for tally in tallies), "every problem has n samples"
    num_correct = np.array([tally.num_correct for tally in tallies])
    ks = [k for k in cfg.ks if k <= num_samples]
    curves = np.asarray(pass_at_k(num_samples, num_correct[:, None], np.array(ks, dtype=np.int64)))  # [P, K]
    means, intervals = _means(curves, ks, cfg)
    majority: dict[int, float] = {}
    majority_intervals: dict[int, tuple[float, float]] = {}
    if has_answers:
        votes = np.array([_majority(tally, ks) for tally in tallies]).reshape(len(tallies), len(ks))
        majority, majority_intervals = _means(votes, ks, cfg)
    distinct = tuple(len(tally.right) for tally in tallies)
    tokens = [tally.num_tokens for tally in tallies if tally.num_tokens is not None]
    total = len(tallies) * num_samples
    return PassAtKResult(
        prompt_ids=tuple(prompt_ids),
        num_samples=num_samples,
        num_correct=tuple(num_correct.tolist()),
        num_distinct_correct=distinct,
        pass_at_k=means,
        ci95=intervals,
        majority_at_k=majority,
        majority_ci95=majority_intervals,
        mean_response_length=sum(tokens) / total if len(tokens) == len(tallies) else None,
        truncation_rate=sum(tally.num_truncated for tally in tallies) / total,
        distinct_correct=sum(distinct) / len(tallies),
        verifier_failures=sum(tally.num_unjudged for tally in tallies),
        policy_version=policy_version,
    )


def _means(
    curves: Floats, ks: Sequence[int], cfg: MeasurementConfig
) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
    intervals = bootstrap_interval(curves, cfg.bootstrap_samples, cfg.seed).tolist()
    means = dict(zip(ks, curves.mean(axis=0).tolist(), strict=True))
    return means, {k: (low, high) for k, (low, high) in zip(ks, intervals, strict=True)}


def _majority(tally: ProblemTally, ks: Sequence[int]) -> Floats:
    answers = [*tally.right.elements(), *tally.wrong.elements()]
    is_right = [True] * tally.num_correct + [False] * sum(tally.wrong.values())
    return majority_at_k(answers, is_right, ks)
