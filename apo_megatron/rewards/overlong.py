"""Soft overlong punishment of DAPO (arXiv 2503.14476): answers near the limit lose a part of their reward."""

from __future__ import annotations

from torch import Tensor

from apo_megatron.config.reward import RewardConfig


def shaped_rewards(rewards: Tensor, lengths: Tensor, cfg: RewardConfig, max_new_tokens: int) -> Tensor:
    """The rewards that advantages are made of, [P, G] float -> [P, G]; NaN (not judged) stays NaN.

    R - penalty * clamp((length - (max_new_tokens - buffer)) / buffer, 0, 1), with ``lengths`` [P, G] int in
    response tokens, penalty = ``overlong_penalty`` and buffer = ``overlong_buffer``; buffer 0: R itself.

    It is called between rewards and advantages and nowhere else:

        shaped = shaped_rewards(rewards, lengths, cfg.reward, cfg.rollout.max_new_tokens)
        advantages = estimator(AdvantageInputs(shaped, lengths))

    What counts as right stays with the unshaped reward: ``Sample.reward``, metrics, Pass@K and the choice of
    groups (all right, all wrong) do not see the punishment.
    """
    if cfg.overlong_buffer == 0:
        return rewards
    excess = (lengths - (max_new_tokens - cfg.overlong_buffer)) / cfg.overlong_buffer
    return rewards - cfg.overlong_penalty * excess.clamp(0, 1)
