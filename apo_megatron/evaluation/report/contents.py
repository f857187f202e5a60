"""What the report says: numbers, paired comparisons and warnings in words, as plain containers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apo_megatron.evaluation.comparison import Comparison, compare, mcnemar_p_value
from apo_megatron.evaluation.report.folders import (
    BenchmarkResult,
    Evaluation,
    Problem,
    shared_benchmarks,
    shared_ks,
)
from apo_megatron.evaluation.report.samples import MAX_CHARACTERS, ChosenSamples

SIGNIFICANT = 0.05
MUCH_TRUNCATION = 0.05


@dataclass(frozen=True)
class Warned:
    """A sentence for the reader. Benchmark "" is about all of them."""

    benchmark: str
    text: str


def compare_with_first(evaluations: Sequence[Evaluation], benchmark: str) -> list[Comparison]:
    """Each evaluation but the first (A) against the first (B), at every K that all have."""
    ks = shared_ks(evaluations, benchmark)
    first, *others = (evaluation.benchmarks[benchmark] for evaluation in evaluations)
    return [compare(other, first, ks) for other in others]


def warnings_of(
    evaluations: Sequence[Evaluation], benchmark: str, comparisons: Sequence[Comparison]
) -> list[Warned]:
    """What a reader must know before he believes the numbers of a benchmark."""
    found = [
        text
        for other, comparison in zip(evaluations[1:], comparisons, strict=True)
        for text in _trade(other.label, evaluations[0].label, comparison)
    ]
    for evaluation in evaluations:
        result = evaluation.benchmarks[benchmark]
        total = len(result.prompt_ids) * result.num_samples
        if result.verifier_failures:
            found.append(
                f"{evaluation.label}: {result.verifier_failures:,} of {total:,} samples "
                f"({_percent(result.verifier_failures / total)}) could not be judged and count as wrong, so "
                "its scores are lower bounds."
            )
        if result.truncation_rate > MUCH_TRUNCATION:
            found.append(
                f"{evaluation.label}: {_percent(result.truncation_rate)} of the samples were cut off at the "
                "largest length, mostly before an answer. A longer limit may change the result."
            )
        flat = [f"Pass@{k}" for k in shared_ks(evaluations, benchmark) if len(set(result.ci95[k])) == 1]
        if flat:
            found.append(
                f"{evaluation.label}: all problems have the same {', '.join(flat)}. The intervals have no "
                "width, which says nothing about how certain that is."
            )
    n = evaluations[0].benchmarks[benchmark].num_samples
    if n > 1 and n in shared_ks(evaluations, benchmark):
        found.append(
            f"Pass@{n} rests on all {n} samples: each problem counts 0 or 1, the noisiest estimate there is. "
            "Draw more samples than the largest K."
        )
    return [Warned(benchmark, text) for text in found]


def _trade(label: str, first: str, comparison: Comparison) -> list[str]:
    """Whether Pass@K rose at the smallest K and fell at the largest, and how sure that is."""
    low_k, high_k = min(comparison.differences), max(comparison.differences)
    low, high = comparison.differences[low_k], comparison.differences[high_k]
    if not low.difference > 0 > high.difference:
        return []
    moved = (
        f"{label}: Pass@{low_k} rose by {_points(low.difference)} while Pass@{high_k} fell by "
        f"{_points(high.difference)} against {first}"
    )
    if low.p_holm < SIGNIFICANT and high.p_holm < SIGNIFICANT:
        return [f"{moved}: the space of solutions is contracting (p = {max(low.p_holm, high.p_holm):.2g})."]
    unsure = [f"Pass@{k}" for k, d in ((low_k, low), (high_k, high)) if d.p_holm >= SIGNIFICANT]
    return [f"{moved}, as in a contraction, but {' and '.join(unsure)} may have moved by chance."]


def unshared_benchmarks(evaluations: Sequence[Evaluation]) -> list[Warned]:
    shared = shared_benchmarks(evaluations)
    found = []
    for evaluation in evaluations:
        others = [name for name in evaluation.benchmarks if name not in shared]
        if others:
            found.append(
                Warned(
                    "", f"{evaluation.label}: {', '.join(others)} left out, for not all evaluations have it."
                )
            )
    return found


def other_problems(
    evaluations: Sequence[Evaluation], benchmark: str, problems: Sequence[dict[str, Problem]]
) -> list[Warned]:
    """Problems of the same id whose prompt or gold answer differs from the first evaluation's."""
    first, *others = problems
    ids = evaluations[0].benchmarks[benchmark].prompt_ids
    found = []
    for evaluation, theirs in zip(evaluations[1:], others, strict=True):
        for what, num in (
            ("prompt", sum(first[i].prompt != theirs[i].prompt for i in ids)),
            ("gold answer", sum(first[i].gold != theirs[i].gold for i in ids)),
        ):
            if num:
                found.append(
                    f"{evaluation.label}: {num} of {len(ids)} problems have another {what} than for "
                    f"{evaluations[0].label}, so differences are not the checkpoint's alone. The page shows "
                    f"that of {evaluations[0].label}."
                )
    return [Warned(benchmark, text) for text in found]


def disagreement(evaluation: Evaluation, benchmark: str, chosen: ChosenSamples) -> list[Warned]:
    if not chosen.num_disagreeing:
        return []
    return [
        Warned(
            benchmark,
            f"{evaluation.label}: the generations of {chosen.num_disagreeing} problems do not have the "
            "samples that results.json counted. Numbers are those of results.json; samples may be of "
            "another run.",
        )
    ]


def benchmark_contents(
    evaluations: Sequence[Evaluation],
    benchmark: str,
    comparisons: Sequence[Comparison],
    problems: dict[str, Problem],
) -> dict[str, Any]:
    """Everything about one benchmark but its samples. Per-problem lists are in the order of the first."""
    results = [evaluation.benchmarks[benchmark] for evaluation in evaluations]
    ids = results[0].prompt_ids
    correct = [list(result.num_correct) for result in results]
    return {
        "name": benchmark,
        "num_samples": results[0].num_samples,
        "ks": shared_ks(evaluations, benchmark),
        "problems": [_problem_contents(problems[prompt_id]) for prompt_id in ids],
        "checkpoints": [
            {**_result_contents(result), "correct": of_result}
            for result, of_result in zip(results, correct, strict=True)
        ],
        "comparisons": [
            [
                {
                    "k": k,
                    "difference": difference.difference,
                    "ci95": difference.ci95,
                    "p_value": difference.p_value,
                    "p_holm": difference.p_holm,
                }
                for k, difference in comparison.differences.items()
            ]
            for comparison in comparisons
        ],
        "flip_p_values": [[_flip_p_value(a, b) for b in correct] for a in correct],
    }


def _problem_contents(problem: Problem) -> dict[str, Any]:
    gold = problem.gold
    return {
        "id": problem.problem,
        "prompt": problem.prompt[:MAX_CHARACTERS],
        "num_left_out": max(0, len(problem.prompt) - MAX_CHARACTERS),
        "gold": gold if gold is None else gold[:MAX_CHARACTERS],
    }


def _result_contents(result: BenchmarkResult) -> dict[str, Any]:
    def with_intervals(
        values: dict[int, float], intervals: dict[int, tuple[float, float]]
    ) -> dict[str, list[float]]:
        return {str(k): [values[k], *intervals[k]] for k in sorted(values)}

    total = len(result.prompt_ids) * result.num_samples
    return {
        "pass_at_k": with_intervals(result.pass_at_k, result.ci95),
        "majority_at_k": with_intervals(result.majority_at_k, result.majority_ci95),
        "mean_at_n": sum(result.num_correct) / total,
        "distinct_correct": result.distinct_correct,
        "mean_response_length": result.mean_response_length,
        "truncation_rate": result.truncation_rate,
        "verifier_failures": result.verifier_failures,
        "policy_version": result.policy_version,
    }


def _flip_p_value(a: Sequence[int], b: Sequence[int]) -> float:
    pairs = list(zip(a, b, strict=True))
    return mcnemar_p_value(sum(x > 0 == y for x, y in pairs), sum(y > 0 == x for x, y in pairs))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * abs(difference):.1f} points"
