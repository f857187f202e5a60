"""The rewards there are. A new one is a class and a line in ``_REWARDS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from apo_megatron.config.reward import RewardConfig, RewardTerm
from apo_megatron.errors import ConfigError
from apo_megatron.rewards.countdown import CountdownReward
from apo_megatron.rewards.format import FormatReward
from apo_megatron.rewards.interface import Reward
from apo_megatron.rewards.math import MathReward
from apo_megatron.rewards.text import ExactMatchReward, MultipleChoiceReward
from apo_megatron.rewards.user_function import UserFunctionReward
from apo_megatron.rewards.weighted import WeightedReward

__all__ = ["Reward", "build_reward"]

_REWARDS: Mapping[str, Callable[[RewardConfig], Reward]] = {
    "countdown": CountdownReward,
    "exact_match": ExactMatchReward,
    "format": FormatReward,
    "math_verify": MathReward,
    "multiple_choice": MultipleChoiceReward,
}


def build_reward(cfg: RewardConfig) -> Reward:
    """The reward that ``cfg`` describes: ``cfg.name``, or the weighted sum of ``cfg.rewards``.

    Raises ConfigError for a name that is unknown, or a function that cannot be imported.
    """
    if not cfg.rewards:
        return _build(cfg.name, "reward.name", cfg)
    return WeightedReward([_weighted(term, i, cfg) for i, term in enumerate(cfg.rewards)])


def _weighted(term: RewardTerm, index: int, cfg: RewardConfig) -> tuple[Reward, float]:
    return _build(term.name, f"reward.rewards[{index}].name", cfg), term.weight


def _build(name: str, field: str, cfg: RewardConfig) -> Reward:
    if ":" in name:
        return UserFunctionReward(name, field)
    if name not in _REWARDS:
        raise ConfigError(
            f"{field}={name!r} is unknown: choose one of {', '.join(sorted(_REWARDS))}, or name a function "
            "of your own as package.module:function"
        )
    return _REWARDS[name](cfg)
