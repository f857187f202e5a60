"""Verifiable rewards: ``registry.py`` says what a reward is, one module per task judges answers."""

from apo_megatron.rewards.registry import Reward, build_reward

__all__ = ["Reward", "build_reward"]
