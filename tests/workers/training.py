"""Whole runs of ``train`` and ``sft`` on a tiny model, several in the same processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import apo_megatron.train
import apo_megatron.training_data
from apo_megatron.config import RLConfig, SFTConfig
from apo_megatron.data.collate import Batch, make_batch
from apo_megatron.errors import RewardError, TrainingError
from apo_megatron.sft import sft
from apo_megatron.train import train
from apo_megatron.types import Completion, Prompt


@dataclass
class ToyReward:
    """Judges by ``rule``, so that a random model has something to learn; may fail on a later step."""

    rule: Callable[[Completion], float]
    fail_after: float = math.inf  # groups
    required_fields: Mapping[str, type] = field(default_factory=dict)
    judged: int = 0

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        self.judged += bool(completions)
        if self.judged > self.fail_after:
            raise RewardError("the verifier is gone")
        return [self.rule(completion) for completion in completions]


def starts_low(completion: Completion) -> float:
    return float(completion.token_ids[0] < 50)


def run_all(payload: dict[str, Any]) -> dict[str, Any]:
    """Every scenario; what went wrong where something should go wrong."""
    outcome: dict[str, Any] = {}
    sft(SFTConfig.model_validate(payload["sft"]))
    _train(payload["whole"], ToyReward(starts_low))
    # 2 ranks judge half of the 4 prompts each: the 7th group of a rank belongs to the 4th step.
    outcome["interrupted"] = _train(payload["interrupted"], ToyReward(starts_low, fail_after=6))
    _train(payload["interrupted"], ToyReward(starts_low))
    _train(payload["unmixed"], ToyReward(lambda completion: 1.0))
    apo_megatron.train.make_batch = _with_infinite_advantages  # type: ignore[assignment]
    outcome["not_finite"] = _train(payload["not_finite"], ToyReward(starts_low))
    apo_megatron.train.make_batch = make_batch
    return outcome


def _train(config: dict[str, Any], reward: ToyReward) -> str:
    apo_megatron.training_data.build_reward = lambda cfg: reward
    try:
        train(RLConfig.model_validate(config))
    except (RewardError, TrainingError) as error:
        return str(error)
    return ""


def _with_infinite_advantages(*values: Any) -> Batch:
    batch = make_batch(*values)
    batch.sequences = batch.sequences.with_fields(advantages=batch.sequences.advantages * math.inf)
    return batch
