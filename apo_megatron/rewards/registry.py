"""What a reward is, and the rewards there are. A new one is a class and a line in ``_REWARDS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from apo_megatron.config.schema import RewardConfig
from apo_megatron.errors import ConfigError
from apo_megatron.rewards.countdown import CountdownReward
from apo_megatron.types import Completion, Prompt


class Reward(Protocol):
    """Judges the completions of one prompt."""

    @property
    def required_fields(self) -> Mapping[str, type]:
        """Columns, with their types, that every dataset row needs; checked when the data is loaded."""
        ...

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        """One reward per completion: 1.0 right, 0.0 wrong, NaN could not be judged (not trained on).

        Raises DataError for a prompt without the columns it needs, RewardError where judging itself fails.
        """
        ...


_REWARDS: Mapping[str, Callable[[], Reward]] = {"countdown": CountdownReward}


def build_reward(cfg: RewardConfig) -> Reward:
    """The reward that ``cfg.name`` names. Raises ConfigError for an unknown one."""
    if cfg.name not in _REWARDS:
        raise ConfigError(f"reward.name={cfg.name!r} is unknown: choose one of {sorted(_REWARDS)}")
    return _REWARDS[cfg.name]()
