"""Whether an answer has the asked form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

from apo_megatron.config.reward import RewardConfig
from apo_megatron.errors import ConfigError
from apo_megatron.rewards.judging import judged_rewards
from apo_megatron.rewards.workers import WorkerPool
from apo_megatron.types import Completion, Prompt


class FormatReward:
    """1.0 where ``reward.format_pattern`` matches the whole completion; a dot matches line ends, too.

    Matching runs in workers: on some texts a regular expression takes exponential time.
    """

    required_fields: Mapping[str, type] = MappingProxyType({})

    def __init__(self, cfg: RewardConfig) -> None:
        """Raises ConfigError without a pattern."""
        if cfg.format_pattern is None:
            raise ConfigError("reward.format_pattern is null: the format reward needs a regular expression")
        self._pattern = cfg.format_pattern
        self._workers = WorkerPool(cfg.num_workers, cfg.timeout)

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """Rewards as ``judged_rewards`` says."""
        return self.score_batch([prompt], [completions])[0]

    def score_batch(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> list[list[float]]:
        """``score`` of all prompts; equal texts are matched once."""
        texts = sorted(
            {answer.text for row in completions for answer in row if answer.finish_reason == "stop"}
        )
        found = self._workers.map(matches, [(self._pattern, text) for text in texts])
        verdicts = dict(zip(texts, found, strict=True))
        return [judged_rewards(row, verdicts.__getitem__) for row in completions]

    def close(self) -> None:
        """End the workers; the next text starts new ones."""
        self._workers.close()


def matches(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches the whole of ``text``, but for white space around it."""
    return _compiled(pattern).fullmatch(text.strip()) is not None


@lru_cache(maxsize=8)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
