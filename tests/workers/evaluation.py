"""Evaluation on two ranks, for tests/test_evaluate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from apo_megatron.config import EvaluationConfig, ParallelConfig, RolloutConfig
from apo_megatron.errors import RolloutError
from apo_megatron.evaluate import main
from apo_megatron.evaluation.harness import evaluate_pass_at_k
from apo_megatron.evaluation.result import PassAtKResult
from apo_megatron.parallel.state import ParallelContext, init_parallel
from tests.test_evaluate import DigitReward, FirstTokenReward, ScriptedEngine, make_prompts
from tests.test_rollout import make_engine


def evaluate_on_ranks(payload: dict[str, Any]) -> dict[str, Any]:
    """The harness with float64 weights, a rank without problems, and the command line."""
    parallel = init_parallel(ParallelConfig())
    evaluation, rollout = (
        EvaluationConfig.model_validate(payload["evaluation"]),
        RolloutConfig.model_validate(payload["rollout"]),
    )
    engine = make_engine(Path(payload["folder"]), torch.float64)
    reward, steps = FirstTokenReward(), []
    result = evaluate_pass_at_k(
        engine,
        make_prompts(5),
        reward,
        evaluation,
        rollout,
        parallel,
        progress=lambda problems, tokens: steps.append((problems, tokens)),
    )
    single = evaluate_pass_at_k(engine, make_prompts(1), reward, evaluation, rollout, parallel)
    main(payload["argv"])
    return {
        **_remote(parallel, evaluation, rollout),
        "result": result.to_json(),
        "problems_shown": int(np.sum([problems for problems, _ in steps])),
        "single": single.to_json(),
    }


def run_command_line(payload: dict[str, Any]) -> int:
    """The command in a process of one rank or of several."""
    code = main(payload["argv"])
    assert code == 0
    return code


def _remote(
    parallel: ParallelContext, evaluation: EvaluationConfig, rollout: RolloutConfig
) -> dict[str, Any]:
    """Engines that are done later on one rank, that come back without weights, and that fail on one rank."""

    def run(engine: ScriptedEngine, source: Any) -> PassAtKResult:
        prompts = make_prompts(5)
        return evaluate_pass_at_k(
            engine, prompts, DigitReward(), evaluation, rollout, parallel, source=source
        )

    late = ScriptedEngine()
    late.num_looks = 3 * parallel.rank
    counts = run(late, source="weights").num_correct
    waited = {"counts": list(counts), "offered": late.sources == ["weights"] * 3}
    lost, failing = ScriptedEngine(), ScriptedEngine()
    lost.num_looks = 3
    failing.failure = "the server is gone" if parallel.rank == 1 else None
    errors = []
    for engine in (lost, failing):
        try:
            run(engine, source=None)
        except RolloutError as error:
            errors.append(str(error))
    return {"waited": waited, "lost": errors[0], "failed": errors[1]}
