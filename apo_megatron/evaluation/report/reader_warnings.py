"""What a reader must know before he believes the numbers: one list, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apo_megatron.evaluation.comparison import Comparison
from apo_megatron.evaluation.report.folders import Evaluation, Problem, shared_benchmarks

SIGNIFICANT = 0.05
MUCH_TRUNCATION = 0.05
# Settings of samples that may differ between checkpoints: what was evaluated, where it lay and how it was
# computed; chance, which p-values cover; and the problems, which are compared one by one.
_MAY_DIFFER = {
    "columns",
    "problems",
    "model.dtype",
    "rollout.engine",
    "rollout.sglang.server_args",
    "evaluation.seed",
}
_FILES = "files "  # begins the names of fingerprints


@dataclass(frozen=True)
class Warned:
    """A sentence for the reader. Benchmark "" is about all of them."""

    benchmark: str
    text: str


def general_warnings(evaluations: Sequence[Evaluation]) -> list[Warned]:
    """What is not about one benchmark."""
    shared = shared_benchmarks(evaluations)
    found = []
    for evaluation in evaluations:
        others = [name for name in evaluation.benchmarks if name not in shared]
        if others:
            found.append(
                f"{evaluation.label}: {', '.join(others)} left out, for not all evaluations have it."
            )
    num_comparisons = (len(evaluations) - 1) * len(shared)
    if num_comparisons > 1:
        found.append(
            "p (Holm) is corrected for the K of one comparison, not for the number of checkpoints and "
            f"benchmarks: the more comparisons, here {num_comparisons}, the likelier one is below "
            f"{SIGNIFICANT} by chance."
        )
    return [Warned("", text) for text in found]


def benchmark_warnings(
    evaluations: Sequence[Evaluation],
    benchmark: str,
    comparisons: Sequence[Comparison],
    problems: Sequence[dict[str, Problem]],
    num_disagreeing: Sequence[int],
) -> list[Warned]:
    """What is about one benchmark.

    ``comparisons`` are those of all but the first evaluation with the first; ``problems`` are each
    evaluation's, and ``num_disagreeing`` counts those whose generations ``results.json`` did not count.
    """
    first, *others = evaluations
    found = []
    for other, comparison, theirs in zip(others, comparisons, problems[1:], strict=True):
        differing = [
            *_other_settings(first, other, benchmark),
            *_other_problems(first, other, benchmark, problems[0], theirs),
        ]
        found += [*_trade(first, other, comparison, is_alike=not differing), *differing]
    for evaluation, num in zip(evaluations, num_disagreeing, strict=True):
        found += _weaknesses(evaluation, benchmark, num)
    result = first.benchmarks[benchmark]
    n = result.num_samples
    if n > 1 and n in result.ks:
        found.append(
            f"Pass@{n} rests on all {n} samples: each problem counts 0 or 1, the noisiest estimate there is. "
            "Draw more samples than the largest K."
        )
    return [Warned(benchmark, text) for text in found]


def merged(warned: Sequence[Warned]) -> list[Warned]:
    """Each sentence once, with all the benchmarks that it is about."""
    benchmarks: dict[str, list[str]] = {}
    for warning in warned:
        benchmarks.setdefault(warning.text, []).append(warning.benchmark)
    return [Warned(", ".join(dict.fromkeys(names)), text) for text, names in benchmarks.items()]


def _trade(first: Evaluation, other: Evaluation, comparison: Comparison, is_alike: bool) -> list[str]:
    """Whether Pass@1 rose and Pass@K at the largest K fell, and how sure it is that the checkpoint did it."""
    high_k = max(comparison.differences)
    low, high = comparison.differences[1], comparison.differences[high_k]
    if not low.difference > 0 > high.difference:
        return []
    moved = (
        f"{other.label}: Pass@1 rose by {_points(low.difference)} while Pass@{high_k} fell by "
        f"{_points(high.difference)} against {first.label}"
    )
    unsure = [f"Pass@{k}" for k, d in ((1, low), (high_k, high)) if d.p_holm >= SIGNIFICANT]
    if unsure:
        return [f"{moved}, as in a contraction, but {' and '.join(unsure)} may have moved by chance."]
    if not is_alike:
        return [f"{moved}, as in a contraction, but more than the checkpoint differs between the two."]
    return [f"{moved}: the space of solutions is contracting (p = {max(low.p_holm, high.p_holm):.2g})."]


def _other_settings(first: Evaluation, other: Evaluation, benchmark: str) -> list[str]:
    """Settings that move Pass@K by themselves: a lower temperature alone looks like a contraction."""
    ours, theirs = first.settings(benchmark), other.settings(benchmark)
    if ours is None or theirs is None:
        return []
    differing = [
        name
        for name in {**ours, **theirs}
        if name not in _MAY_DIFFER and not name.startswith(_FILES) and ours.get(name) != theirs.get(name)
    ]
    if not differing:
        return []

    def shown(settings: dict[str, Any], name: str) -> str:
        return str(settings.get(name, "not recorded"))  # samples of a file: nobody knows how they were drawn

    found = "; ".join(f"{name}: {shown(ours, name)} there, {shown(theirs, name)} here" for name in differing)
    return [
        f"{other.label}: other settings than for {first.label}. {found}, so differences are not the "
        "checkpoint's alone."
    ]


def _other_problems(
    first: Evaluation,
    other: Evaluation,
    benchmark: str,
    ours: dict[str, Problem],
    theirs: dict[str, Problem],
) -> list[str]:
    """Problems of the same id whose prompt or gold answer differs."""
    ids = first.benchmarks[benchmark].prompt_ids
    return [
        f"{other.label}: {num} of {len(ids)} problems have another {what} than for {first.label}, so "
        f"differences are not the checkpoint's alone. The page shows that of {first.label}."
        for what, num in (
            ("prompt", sum(ours[i].prompt != theirs[i].prompt for i in ids)),
            ("gold answer", sum(ours[i].gold != theirs[i].gold for i in ids)),
        )
        if num
    ]


def _weaknesses(evaluation: Evaluation, benchmark: str, num_disagreeing: int) -> list[str]:
    """Of one evaluation, whatever it is compared with."""
    result = evaluation.benchmarks[benchmark]
    total = len(result.prompt_ids) * result.num_samples
    found = []
    if result.verifier_failures:
        found.append(
            f"{result.verifier_failures:,} of {total:,} samples "
            f"({_percent(result.verifier_failures / total)}) could not be judged and count as wrong, so its "
            "scores are lower bounds."
        )
    if result.truncation_rate > MUCH_TRUNCATION:
        found.append(
            f"{_percent(result.truncation_rate)} of the samples were cut off at the largest length, mostly "
            "before an answer. A longer limit may change the result."
        )
    flat = [f"Pass@{k}" for k in result.ks if len(set(result.ci95[k])) == 1]
    if flat:
        found.append(
            f"all problems have the same {', '.join(flat)}. The intervals have no width, which says nothing "
            "about how certain that is."
        )
    if num_disagreeing:
        found.append(
            f"the generations of {num_disagreeing} problems do not have the samples that results.json "
            "counted. Numbers are those of results.json; samples may be of another run."
        )
    return [f"{evaluation.label}: {text}" for text in found]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * abs(difference):.1f} points"
