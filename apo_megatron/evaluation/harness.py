"""Samples every held-out problem n times, counts the right answers, and turns counts into Pass@K."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from apo_megatron.config.schema import EvaluationConfig, RolloutConfig
from apo_megatron.errors import DataError, RolloutError
from apo_megatron.evaluation.bootstrap import bootstrap_interval
from apo_megatron.evaluation.pass_at_k import pass_at_k
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rewards.interface import score_batch
from apo_megatron.rewards.registry import Reward
from apo_megatron.rollout.engine import RolloutEngine, SampleRequest, SamplingParams
from apo_megatron.rollout.groups import check_versions
from apo_megatron.rollout.sampling import sampling_params
from apo_megatron.rollout.waiting import finish_generation, start_generation
from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

Progress = Callable[[int, int], None]  # (problems, tokens) done since the last call, over all ranks


@dataclass(frozen=True)
class PassAtKResult:
    """What one evaluation measured. Per-problem fields are in the order of the problems, length P."""

    prompt_ids: tuple[str, ...]  # [P]
    num_samples: int  # n, per problem
    num_correct: tuple[int, ...]  # [P], c of each problem
    pass_at_k: dict[int, float]  # K -> mean over problems, in [0, 1]
    ci95: dict[int, tuple[float, float]]  # K -> 95 % bootstrap interval over problems
    mean_response_length: float  # tokens, the stop token included
    truncation_rate: float  # share of samples that ended at max_new_tokens
    distinct_correct: float  # different right answers (texts) per problem, mean over problems
    verifier_failures: int  # samples that could not be judged; counted as wrong
    policy_version: int  # weights that were evaluated

    def to_json(self) -> dict[str, Any]:
        """Plain containers for ``json.dump``; K becomes a string."""
        return {
            **asdict(self),
            "prompt_ids": list(self.prompt_ids),
            "num_correct": list(self.num_correct),
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "ci95": {str(k): list(interval) for k, interval in self.ci95.items()},
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> PassAtKResult:
        """The result that ``to_json`` wrote; other keys are left alone."""
        fields = {name: values[name] for name in PassAtKResult.__dataclass_fields__}
        fields["prompt_ids"] = tuple(fields["prompt_ids"])
        fields["num_correct"] = tuple(fields["num_correct"])
        fields["pass_at_k"] = {int(k): value for k, value in fields["pass_at_k"].items()}
        fields["ci95"] = {int(k): (low, high) for k, (low, high) in fields["ci95"].items()}
        return PassAtKResult(**fields)


@dataclass(frozen=True)
class _ProblemCounts:
    """What is kept of the samples of one problem."""

    correct: int
    distinct_correct: int
    unjudged: int
    truncated: int
    tokens: int


def evaluate_pass_at_k(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    cfg: EvaluationConfig,
    rollout: RolloutConfig,
    parallel: ParallelContext | None,
    *,
    num_samples: int | None = None,
    progress: Progress | None = None,
    source: WeightSource | None = None,
) -> PassAtKResult:
    """Pass@K of the engine's weights on ``prompts``, the same result on every rank. Collective.

    Problems are spread over the ranks of ``parallel`` (None: this process alone), which all pass the same
    prompts. ``num_samples`` overrides cfg.num_samples; K above it are left out. Temperature, top-p and seed
    come from ``cfg``, response length, stop tokens and batch size from ``rollout``. A reward of at least 1
    is right. ``source`` has the engine's weights, for engines that lose them meanwhile. Raises DataError
    without prompts, RolloutError and RewardError on every rank where drawing or judging fails on one.
    """
    if not prompts:
        raise DataError("evaluation without problems: evaluation.data_path must name a file with some")
    num_samples = cfg.num_samples if num_samples is None else num_samples
    sampling = replace(
        sampling_params(rollout, cfg.seed),
        num_samples=num_samples,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=0,
    )
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    mine = prompts[rank::world]
    chunk_size = max(1, rollout.max_batch_size // num_samples)
    counts: list[list[_ProblemCounts]] = [[] for _ in range(world)]  # by rank
    for start in range(0, -(-len(prompts) // world), chunk_size):  # as often on every rank
        chunk = mine[start : start + chunk_size]
        if parallel is None:
            shares = [_count_all(chunk, engine.generate(chunk, sampling), reward, engine.policy_version)]
        else:
            shares = _count_together(engine, chunk, sampling, reward, parallel, source)
        for of_rank, new in zip(counts, shares, strict=True):
            of_rank += new
        if progress is not None:
            new = [problem for share in shares for problem in share]
            progress(len(new), sum(problem.tokens for problem in new))
    in_order = [counts[i % world][i // world] for i in range(len(prompts))]
    return _result(prompts, in_order, num_samples, cfg, engine.policy_version)


def _count_together(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    reward: Reward,
    parallel: ParallelContext,
    source: WeightSource | None,
) -> list[list[_ProblemCounts]]:
    """Draw for and judge this rank's ``prompts``; the counts of all ranks, by rank. Collective."""
    requests = [SampleRequest(prompt, sampling.num_samples) for prompt in prompts]
    generation = start_generation(engine, requests, sampling)

    def count() -> list[_ProblemCounts]:
        return _count_all(prompts, generation.results(), reward, engine.policy_version)

    shares, is_whole = finish_generation(generation, engine, source, parallel, count)
    if not is_whole:
        raise RolloutError(
            f"no engine has the weights of version {engine.policy_version} any more, and the evaluation "
            "cannot give them again: start engines and evaluation anew"
        )
    return shares


def _count_all(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    reward: Reward,
    policy_version: int,
) -> list[_ProblemCounts]:
    for prompt, answers in zip(prompts, completions, strict=True):
        check_versions(prompt, answers, policy_version, policy_version)
    rewards = score_batch(reward, prompts, completions)
    return [_count(answers, values) for answers, values in zip(completions, rewards, strict=True)]


def _count(completions: Sequence[Completion], scores: Sequence[float]) -> _ProblemCounts:
    rewards = np.array(scores, dtype=np.float64)
    assert rewards.shape == (len(completions),), "a reward must judge every completion"
    assert all(completion.finish_reason != "abort" for completion in completions), "nobody stopped them"
    right = rewards >= 1  # False for NaN
    return _ProblemCounts(
        correct=int(right.sum()),
        distinct_correct=len({completions[i].text.strip() for i in right.nonzero()[0].tolist()}),
        unjudged=int(np.isnan(rewards).sum()),
        truncated=sum(completion.finish_reason == "length" for completion in completions),
        tokens=sum(len(completion.token_ids) for completion in completions),
    )


def _result(
    prompts: Sequence[Prompt],
    counts: Sequence[_ProblemCounts],
    num_samples: int,
    cfg: EvaluationConfig,
    policy_version: int,
) -> PassAtKResult:
    num_correct = np.array([problem.correct for problem in counts])
    ks = [k for k in cfg.ks if k <= num_samples]
    curves = np.asarray(pass_at_k(num_samples, num_correct[:, None], np.array(ks, dtype=np.int64)))  # [P, K]
    intervals = bootstrap_interval(curves, cfg.bootstrap_samples, cfg.seed).tolist()
    total = len(counts) * num_samples
    return PassAtKResult(
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        num_samples=num_samples,
        num_correct=tuple(num_correct.tolist()),
        pass_at_k=dict(zip(ks, curves.mean(axis=0).tolist(), strict=True)),
        ci95={k: (low, high) for k, (low, high) in zip(ks, intervals, strict=True)},
        mean_response_length=sum(problem.tokens for problem in counts) / total,
        truncation_rate=sum(problem.truncated for problem in counts) / total,
        distinct_correct=sum(problem.distinct_correct for problem in counts) / len(counts),
        verifier_failures=sum(problem.unjudged for problem in counts),
        policy_version=policy_version,
    )
