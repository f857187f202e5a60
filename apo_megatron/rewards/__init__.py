"""Verifiable rewards: ``interface.py`` says what a reward is, ``registry.py`` which there are."""

from apo_megatron.rewards.registry import Reward, build_reward

__all__ = ["Reward", "build_reward"]
