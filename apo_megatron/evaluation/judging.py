"""From completions to judged samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from apo_megatron.evaluation.result import JudgedSample
from apo_megatron.rewards.interface import AnswerReward, Reward, score_batch
from apo_megatron.rollout.engine import SampleRequest
from apo_megatron.types import Completion


def judge(
    reward: Reward,
    requests: Sequence[SampleRequest],
    completions: Sequence[Sequence[Completion]],
) -> list[list[JudgedSample]]:
    """The samples of each request, judged. Raises DataError and RewardError as rewards do."""
    prompts = [request.prompt for request in requests]
    rewards = score_batch(reward, prompts, completions)
    samples = []
    for request, drawn, values in zip(requests, completions, rewards, strict=True):
        assert np.shape(values) == (len(drawn),), "a reward must judge every completion"
        assert all(completion.finish_reason != "abort" for completion in drawn), "nobody stopped them"
        answers: Sequence[str | None] = [None] * len(drawn)
        if isinstance(reward, AnswerReward):
            answers = reward.answers(request.prompt, drawn, values)
        samples.append(
            [
                JudgedSample(
                    problem=request.prompt.prompt_id,
                    sample=request.first + i,
                    text=completion.text,
                    finish_reason=completion.finish_reason,
                    num_tokens=len(completion.token_ids),
                    reward=None if math.isnan(value) else float(value),
                    answer=answer,
                )
                for i, (completion, value, answer) in enumerate(zip(drawn, values, answers, strict=True))
            ]
        )
    return samples
