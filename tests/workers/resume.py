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
from apo_megatron.errors import CheckpointError, RunInterrupted
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.train import train
from apo_megatron.types import Prompt, SampleGroup
from tests.workers.training import ToyReward, starts_low

gather_groups = apo_megatron.train.gather_groups


def run_all(payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Per run its rollouts step by step, and how it ended where it did not reach its end.

    A run with ``stop_in`` gets a signal on its last rank during that step, counted from 1.
    """
    return [_run(run["config"], run.get("stop_in")) for run in payload["runs"]]


def _run(config: dict[str, Any], stop_in: int | None) -> dict[str, Any]:
    rollouts: list[Any] = []

    def record(
        groups: Sequence[SampleGroup], prompts: Sequence[Prompt], parallel: ParallelContext
    ) -> list[SampleGroup]:
        whole = gather_groups(groups, prompts, parallel)
        rollouts.append([_sampled(group) for group in whole])
        if len(rollouts) == stop_in and parallel.rank == parallel.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole

    apo_megatron.train.gather_groups = record
    apo_megatron.training_data.build_reward = lambda cfg: ToyReward(starts_low)
    ended = ""
    try:
        train(RLConfig.model_validate(config))
    except (RunInterrupted, CheckpointError) as error:
        ended = f"{type(error).__name__}: {error}"
    return {"rollouts": rollouts, "ended": ended}


def _sampled(group: SampleGroup) -> tuple[str, list[torch.Tensor]]:
    completions = [sample.completion for sample in group.samples]
    return group.prompt.prompt_id, [
        torch.from_numpy(values) for c in completions for values in (c.token_ids, c.log_probs)
    ]
