"""Which advantage estimators there are, what each looks at, and which groups teach it something.

A new one is a function, a line here, a name in ``config/advantages.py`` (with a section where it has
settings), a row in the table of docs/objective.md and its definition in tests/test_advantage_estimators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from apo_megatron.config import ObjectiveConfig
from apo_megatron.objectives.advantages import (
    AdvantageInputs,
    dr_grpo_advantages,
    group_normalized_advantages,
    opo_advantages,
    reinforce_advantages,
    reinforce_plus_plus_baseline_advantages,
    rloo_advantages,
)
from apo_megatron.objectives.pass_at_k_advantages import passk_advantages, pkpo_advantages
from apo_megatron.objectives.reward_term_advantages import dvao_advantages, gdpo_advantages
from apo_megatron.objectives.risk_advantages import riskpo_advantages, track_quantiles
from apo_megatron.objectives.visited_advantages import dcpo_advantages, note_visits

# Fields of AdvantageInputs that an estimator looks at. Terms are kept only where they are looked at.
AdvantageNeed = Literal["rewards", "lengths", "is_correct", "reward_terms", "prompt_ids"]
AdvantageFunction = Callable[[AdvantageInputs, ObjectiveConfig], Tensor]
NextState = Callable[[AdvantageInputs, ObjectiveConfig], dict[str, Any]]  # as JSON can hold it


@dataclass(frozen=True)
class AdvantageEstimatorSpec:
    """An estimator [P, G] -> [P, G] and what must be known of it."""

    function: AdvantageFunction
    needs: frozenset[AdvantageNeed] = frozenset({"rewards"})
    settings: str | None = None  # its section in ObjectiveConfig
    trains_on_zeros: bool = (
        True  # false: samples with A = 0 are left out, also in groups that teach something
    )
    # Of one that keeps something: AdvantageInputs.state of the next step, from the inputs of this one.
    next_state: NextState | None = None
    # true: at other groups of the step or at earlier steps; a group alone does not say whether it teaches.
    looks_beyond_group: bool = False


def estimate_advantages(inputs: AdvantageInputs, cfg: ObjectiveConfig) -> Tensor:
    """The advantages [P, G] that ``cfg.advantage_estimator`` gives: finite, 0 where a reward is NaN."""
    return ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].function(inputs, cfg)


def teaching_groups(inputs: AdvantageInputs, cfg: ObjectiveConfig) -> Tensor:
    """Groups with an advantage that is not 0, [P] bool: the others are left out of training.

    All of them where that depends on other groups, of the step or of earlier ones, which are not there.
    """
    if ADVANTAGE_ESTIMATORS[cfg.advantage_estimator].looks_beyond_group:
        return torch.ones(len(inputs.rewards), dtype=torch.bool, device=inputs.rewards.device)
    return estimate_advantages(inputs, cfg).ne(0).any(dim=1)


def _gdpo(inputs: AdvantageInputs, cfg: ObjectiveConfig) -> Tensor:
    assert inputs.reward_terms is not None and inputs.term_weights is not None
    return gdpo_advantages(inputs.reward_terms, inputs.term_weights)


def _dvao(inputs: AdvantageInputs, cfg: ObjectiveConfig) -> Tensor:
    assert inputs.reward_terms is not None and inputs.term_weights is not None
    return dvao_advantages(inputs.reward_terms, inputs.term_weights)


_CORRECTNESS: frozenset[AdvantageNeed] = frozenset({"is_correct"})
_REWARDS_AND_LENGTHS: frozenset[AdvantageNeed] = frozenset({"rewards", "lengths"})
_TERMS: frozenset[AdvantageNeed] = frozenset({"reward_terms"})

ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimatorSpec] = {
    "grpo": AdvantageEstimatorSpec(lambda x, cfg: group_normalized_advantages(x.rewards)),
    "dr_grpo": AdvantageEstimatorSpec(lambda x, cfg: dr_grpo_advantages(x.rewards)),
    "rloo": AdvantageEstimatorSpec(lambda x, cfg: rloo_advantages(x.rewards)),
    "reinforce_plus_plus_baseline": AdvantageEstimatorSpec(
        lambda x, cfg: reinforce_plus_plus_baseline_advantages(x.rewards, x.lengths), _REWARDS_AND_LENGTHS
    ),
    "opo": AdvantageEstimatorSpec(lambda x, cfg: opo_advantages(x.rewards, x.lengths), _REWARDS_AND_LENGTHS),
    "psr": AdvantageEstimatorSpec(
        lambda x, cfg: reinforce_advantages(x.rewards, x.is_correct, right_weight=1.0, wrong_weight=0.0),
        _CORRECTNESS,
        trains_on_zeros=False,
    ),
    "nsr": AdvantageEstimatorSpec(
        lambda x, cfg: reinforce_advantages(x.rewards, x.is_correct, right_weight=0.0, wrong_weight=1.0),
        _CORRECTNESS,
        trains_on_zeros=False,
    ),
    "w_reinforce": AdvantageEstimatorSpec(
        lambda x, cfg: reinforce_advantages(x.rewards, x.is_correct, cfg.w_reinforce.right_weight, 1.0),
        _CORRECTNESS,
        settings="w_reinforce",
    ),
    "passk": AdvantageEstimatorSpec(
        lambda x, cfg: passk_advantages(x.rewards, x.is_correct, cfg.passk.k), _CORRECTNESS, settings="passk"
    ),
    "pkpo": AdvantageEstimatorSpec(lambda x, cfg: pkpo_advantages(x.rewards, cfg.pkpo.k), settings="pkpo"),
    "gdpo": AdvantageEstimatorSpec(_gdpo, _TERMS),
    "dvao": AdvantageEstimatorSpec(_dvao, _TERMS),
    "riskpo": AdvantageEstimatorSpec(
        lambda x, cfg: riskpo_advantages(x.rewards, cfg.riskpo, x.state),
        settings="riskpo",
        next_state=lambda x, cfg: track_quantiles(x.rewards, cfg.riskpo, x.state),
        looks_beyond_group=True,
    ),
    "dcpo": AdvantageEstimatorSpec(
        lambda x, cfg: dcpo_advantages(x.rewards, x.prompt_ids, x.state),
        frozenset({"rewards", "prompt_ids"}),
        next_state=lambda x, cfg: note_visits(x.rewards, x.prompt_ids, x.state),
        looks_beyond_group=True,
    ),
}
