"""Evaluation on two ranks, for tests/test_evaluate.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from apo_megatron.config import EvaluationConfig, ParallelConfig, RolloutConfig
from apo_megatron.evaluate import main
from apo_megatron.evaluation.harness import evaluate_pass_at_k
from apo_megatron.parallel.state import init_parallel
from tests.test_evaluate import FirstTokenReward, make_prompts
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
        "result": result.to_json(),
        "problems_shown": int(np.sum([problems for problems, _ in steps])),
        "single": single.to_json(),
    }
