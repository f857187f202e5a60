"""Folders of evaluations as the harness leaves them, generated: deterministic, of any size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apo_megatron.evaluation.answers import majority_at_k
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import pass_at_k

Text = Callable[[int, int], str]  # (problem, sample) -> what the model wrote


def solve_chances(num_problems: int, sharpening: float, forgotten: float, seed: int = 0) -> list[float]:
    """Chances of a right sample [P]: ``sharpening`` moves them away from 1/2, and of the problems that are
    rarely solved the share ``forgotten`` is never solved any more."""
    rng = np.random.default_rng(seed)
    chances = rng.beta(0.35, 1.1, num_problems)
    luck = rng.random(num_problems)
    odds = (chances / (1 - chances)) ** sharpening * sharpening**2
    sharpened = odds / (1 + odds)
    return np.where((chances < 0.12) & (luck < forgotten), 0.0, sharpened).tolist()


def draw_counts(chances: Sequence[float], num_samples: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).binomial(num_samples, chances).tolist()


def plain_text(problem: int, sample: int) -> str:
    return (
        f"We try case {sample} of problem {problem}.\n"
        + "Then the sum is even, so it can be halved.\n" * (sample % 11)
    )


def benchmark_result(
    counts: Sequence[int], num_samples: int, ks: Sequence[int], **changes: Any
) -> dict[str, Any]:
    """What results.json says about one benchmark: the right samples of problem i are its first counts[i]."""
    curves = np.asarray(pass_at_k(num_samples, np.array(counts)[:, None], np.array(ks)))
    votes = np.array(
        [
            majority_at_k(_answers(c, num_samples), [s < c for s in range(num_samples)], list(ks))
            for c in counts
        ]
    )
    result = {
        "prompt_ids": [f"problem-{i:03}" for i in range(len(counts))],
        "num_samples": num_samples,
        "num_correct": list(counts),
        "mean_response_length": 812.4,
        "truncation_rate": 0.012,
        "distinct_correct": float(np.mean([c > 0 for c in counts])),
        "num_distinct_correct": [int(c > 0) for c in counts],
        "verifier_failures": 0,
        "policy_version": 0,
    }
    for name, interval, values in (
        ("pass_at_k", "ci95", curves),
        ("majority_at_k", "majority_ci95", votes),
    ):
        means = values.mean(axis=0).tolist()
        result[name] = dict(zip(map(str, ks), means, strict=True))
        intervals = bootstrap_interval(values, 2_000, 0).tolist()
        result[interval] = dict(zip(map(str, ks), intervals, strict=True))
    return {**result, **changes}


def _answers(num_correct: int, num_samples: int) -> list[str | None]:
    wrong = [None if s % 5 == 0 else str(s % 3) for s in range(num_samples)]
    return ["42" if s < num_correct else wrong[s] for s in range(num_samples)]


def write_evaluation(
    folder: Path,
    label: str,
    benchmarks: dict[str, dict[str, Any]],
    text: Text = plain_text,
    num_ranks: int = 2,
) -> Path:
    """The whole folder; returns it. Samples are spread over ranks, and written last to first."""
    for name, result in benchmarks.items():
        generations = folder / "generations" / name
        generations.mkdir(parents=True)
        (folder / "problems").mkdir(exist_ok=True)
        lines: list[list[str]] = [[] for _ in range(num_ranks)]
        problems = []
        for i, (prompt_id, count) in enumerate(zip(result["prompt_ids"], result["num_correct"], strict=True)):
            prompt = f"Problem {i}. Find the number of pairs (a, b) with a + b = {2 * i + 7} and a < b."
            problems.append(json.dumps({"problem": prompt_id, "prompt": prompt, "gold": "42"}))
            answers = _answers(count, result["num_samples"])
            for sample in reversed(range(result["num_samples"])):
                row = {
                    "problem": prompt_id,
                    "sample": sample,
                    "text": text(i, sample),
                    "finish_reason": "length" if sample % 23 == 22 else "stop",
                    "num_tokens": 100 + sample,
                    "reward": float(sample < count),
                    "answer": answers[sample],
                }
                lines[(i + sample) % num_ranks].append(json.dumps(row))
        (folder / "problems" / f"{name}.jsonl").write_text("\n".join(problems) + "\n")
        for rank, of_rank in enumerate(lines):
            (generations / f"rank_{rank:05}.jsonl").write_text("".join(line + "\n" for line in of_rank))
    results = {"label": label, "benchmarks": benchmarks}
    (folder / "results.json").write_text(json.dumps(results))
    return folder
