"""Runs of ``train`` that write down what was sampled, and may be asked to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch

import apo_megatron.train
import apo_megatron.training_data
from apo_megatron.config import RLConfig
from apo_megatron.data.collate import TrainingSequence
from apo_megatron.errors import CheckpointError, RolloutError, RunInterrupted
from apo_megatron.run import Evaluator
from apo_megatron.train import train
from apo_megatron.types import SampleGroup
from tests.workers.training import ToyReward, starts_low

trained_sequences, run_evaluation = apo_megatron.train.trained_sequences, Evaluator.run


def run_all(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per run its rollouts step by step, and how it ended where it did not reach its end.

    A run with ``stop_in`` gets a signal on its last rank during that step, counted from 1; one with
    ``fails_at_end`` cannot make its last evaluation.
    """
    return [_run(run["config"], run.get("stop_in"), "fails_at_end" in run) for run in payload["runs"]]


def _run(config: dict[str, Any], stop_in: int | None, fails_at_end: bool) -> dict[str, Any]:
    rollouts: list[Any] = []

    def evaluate(evaluator: Evaluator, tag: str, version: int) -> None:
        if fails_at_end and tag == "final":
            raise RolloutError("no server")
        run_evaluation(evaluator, tag, version)

    def record(groups: Sequence[SampleGroup]) -> list[TrainingSequence]:
        rollouts.append([_sampled(group) for group in groups])
        if len(rollouts) == stop_in and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return trained_sequences(groups)

    apo_megatron.train.trained_sequences = record
    Evaluator.run = evaluate  # type: ignore[method-assign,assignment]
    apo_megatron.training_data.build_reward = lambda cfg: ToyReward(starts_low)
    ended = ""
    try:
        train(RLConfig.model_validate(config))
    except (RunInterrupted, CheckpointError, RolloutError) as error:
        ended = f"{type(error).__name__}: {error}"
    return {"rollouts": rollouts, "ended": ended}


def _sampled(group: SampleGroup) -> tuple[str, list[torch.Tensor]]:
    completions = [sample.completion for sample in group.samples]
    return group.prompt.prompt_id, [
        torch.from_numpy(values) for c in completions for values in (c.token_ids, c.log_probs)
    ]
