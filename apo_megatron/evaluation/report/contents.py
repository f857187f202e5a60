"""The numbers of the report and its paired comparisons, as plain containers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from apo_megatron.evaluation.comparison import Comparison, compare, mcnemar_p_value
from apo_megatron.evaluation.report.folders import BenchmarkResult, Evaluation, Problem
from apo_megatron.evaluation.report.samples import MAX_CHARACTERS


def compare_with_first(evaluations: Sequence[Evaluation], benchmark: str) -> list[Comparison]:
    """Each evaluation but the first (A) against the first (B), at every K of the report."""
    ks = evaluations[0].benchmarks[benchmark].ks
    first, *others = (evaluation.benchmarks[benchmark] for evaluation in evaluations)
    return [compare(other, first, ks) for other in others]


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
        "ks": results[0].ks,
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

    return {
        "pass_at_k": with_intervals(result.pass_at_k, result.ci95),
        "majority_at_k": with_intervals(result.majority_at_k, result.majority_ci95),
        "distinct_correct": result.distinct_correct,
        "mean_response_length": result.mean_response_length,
        "truncation_rate": result.truncation_rate,
        "verifier_failures": result.verifier_failures,
    }


def _flip_p_value(a: Sequence[int], b: Sequence[int]) -> float:
    pairs = list(zip(a, b, strict=True))
    return mcnemar_p_value(sum(x > 0 == y for x, y in pairs), sum(y > 0 == x for x, y in pairs))
