"""Samples every held-out problem n times while a model trains, and turns the samples into Pass@K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from apo_megatron.config.evaluation import MeasurementConfig
from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.errors import DataError, RolloutError
from apo_megatron.evaluation.judging import judge
from apo_megatron.evaluation.result import PassAtKResult, ProblemTally, make_result
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rewards.interface import AnswerReward
from apo_megatron.rewards.registry import Reward
from apo_megatron.rollout.engine import RolloutEngine, SampleRequest, SamplingParams
from apo_megatron.rollout.groups import check_versions
from apo_megatron.rollout.sampling import sampling_params
from apo_megatron.rollout.waiting import finish_generation, start_generation
from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

# Drawn from servers at once: so many that the end of one lot, when few requests run, is short beside it.
_SERVER_SAMPLES = 4096

Progress = Callable[[int, int], None]  # (problems, tokens) done since the last call, over all ranks


def evaluate_pass_at_k(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    cfg: MeasurementConfig,
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
    come from ``cfg``, response length, stop tokens and batch size (embedded engine) from ``rollout``. A
    reward of at least 1 is right. ``source`` has the engine's weights, for engines that lose them meanwhile.
    Raises DataError without prompts, RolloutError and RewardError on every rank where drawing or judging
    fails on one.
    """
    if not prompts:
        raise DataError("evaluation without problems: evaluation.data_path must name a file with some")
    num_samples = cfg.num_samples if num_samples is None else num_samples
    sampling = evaluation_sampling(cfg, rollout, num_samples)
    rank, world = (0, 1) if parallel is None else (parallel.rank, parallel.world)
    mine = prompts[rank::world]
    at_once = rollout.max_batch_size if rollout.engine == "embedded" else _SERVER_SAMPLES
    chunk_size = max(1, at_once // num_samples)
    tallies: list[list[ProblemTally]] = [[] for _ in range(world)]  # by rank
    for start in range(0, -(-len(prompts) // world), chunk_size):  # as often on every rank
        requests = [SampleRequest(prompt, num_samples) for prompt in mine[start : start + chunk_size]]
        if parallel is None:
            drawn = engine.generate([request.prompt for request in requests], sampling)
            shares = [_tally(requests, drawn, reward, engine.policy_version)]
        else:
            shares = _tally_together(engine, requests, sampling, reward, parallel, source)
        for of_rank, new in zip(tallies, shares, strict=True):
            of_rank += new
        if progress is not None:
            new = [problem for share in shares for problem in share]
            progress(len(new), sum(problem.num_tokens or 0 for problem in new))
    return make_result(
        prompt_ids=[prompt.prompt_id for prompt in prompts],
        tallies=[tallies[i % world][i // world] for i in range(len(prompts))],
        num_samples=num_samples,
        cfg=cfg,
        policy_version=engine.policy_version,
        has_answers=isinstance(reward, AnswerReward),
    )


def evaluation_sampling(cfg: MeasurementConfig, rollout: RolloutConfig, num_samples: int) -> SamplingParams:
    """How an evaluation samples: with settings of its own, within the lengths and stop tokens of rollouts."""
    return replace(
        sampling_params(rollout, cfg.seed),
        num_samples=num_samples,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        top_k=0,
    )


def _tally_together(
    engine: RolloutEngine,
    requests: Sequence[SampleRequest],
    sampling: SamplingParams,
    reward: Reward,
    parallel: ParallelContext,
    source: WeightSource | None,
) -> list[list[ProblemTally]]:
    """Draw and judge this rank's ``requests``; the tallies of all ranks, by rank. Collective."""
    generation = start_generation(engine, requests, sampling)

    def tally() -> list[ProblemTally]:
        return _tally(requests, generation.results(), reward, engine.policy_version)

    shares, is_whole = finish_generation(generation, engine, source, parallel, tally)
    if not is_whole:
        raise RolloutError(
            f"no engine has the weights of version {engine.policy_version} any more, and the evaluation "
            "cannot give them again: start engines and evaluation anew"
        )
    return shares


def _tally(
    requests: Sequence[SampleRequest],
    completions: Sequence[Sequence[Completion]],
    reward: Reward,
    policy_version: int,
) -> list[ProblemTally]:
    for request, answers in zip(requests, completions, strict=True):
        check_versions(request.prompt, answers, policy_version, policy_version)
    has_answers = isinstance(reward, AnswerReward)
    tallies = []
    for samples in judge(reward, requests, completions):
        tally = ProblemTally()
        for sample in samples:
            tally.add(sample, has_answers)
        tallies.append(tally)
    return tallies
