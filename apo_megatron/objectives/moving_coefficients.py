"""Push and pull of APO that move from step to step: on a schedule, or, the pull, held by what is measured.

Ours, from no paper (docs/methods.md, Variants).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from apo_megatron.config.objective import ObjectiveConfig
from apo_megatron.objectives.objective import Objective

PUSH_COEFF, PULL_COEFF = "apo/push_coeff", "apo/pull_coeff"
ANCHOR_MASS_RATIO = "apo/anchor_mass_ratio"


def scheduled(start: float, end: float | None, step: int, num_steps: int | None) -> float:
    """A straight line from ``start`` at step 0 to ``end`` at step ``num_steps``, ``end`` from there on.

    ``start`` where there is no end.
    """
    if end is None or num_steps is None:
        return start
    if step >= num_steps:
        return end
    return start + (end - start) * (step / num_steps)


class MovingObjective:
    """The objective of each step of a run, where the coefficients of APO may move.

    What is scheduled follows from the number of the step alone. The adapted pull is a state, the same on
    every rank, because the metrics that it follows are.
    """

    name = "objective"  # of the part of a checkpoint

    def __init__(self, objective: Objective) -> None:
        self._objective, self._cfg = objective, objective.cfg
        self._adapted_pull = objective.cfg.apo_pull_coeff

    @property
    def is_stateful(self) -> bool:
        """Whether there is anything to be saved."""
        return self._cfg.apo_variants.target_anchor_ratio is not None

    def at(self, step: int) -> Objective:
        """The objective of ``step``, counted from 0; that of the configuration itself where nothing moves."""
        push, pull = self._coefficients(step)
        if (push, pull) == (self._cfg.apo_push_coeff, self._cfg.apo_pull_coeff):
            return self._objective
        return self._objective.with_coefficients(push, pull)

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The coefficients that ``step`` was trained with, as metrics; then adapts the pull to the others.

        ``metrics`` are those of the step, the same on every rank. No metrics where nothing moves.
        """
        variants, (push, pull) = self._cfg.apo_variants, self._coefficients(step)
        if not self.is_stateful and variants.schedule_steps is None:
            return {}
        found = {PUSH_COEFF: push, PULL_COEFF: pull}
        ratio = anchor_mass_ratio(metrics) if self.is_stateful else None
        if ratio is not None:
            self._adapted_pull = adapted_pull(pull, ratio, self._cfg)
            found[ANCHOR_MASS_RATIO] = ratio
        return found

    def state_dict(self) -> dict[str, Any]:
        """The pull of the next step."""
        return {"pull_coeff": self._adapted_pull}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adapted_pull = float(state["pull_coeff"])

    def _coefficients(self, step: int) -> tuple[float, float]:
        cfg, variants = self._cfg, self._cfg.apo_variants
        push = scheduled(cfg.apo_push_coeff, variants.final_push_coeff, step, variants.schedule_steps)
        if self.is_stateful:
            return push, self._adapted_pull
        return push, scheduled(cfg.apo_pull_coeff, variants.final_pull_coeff, step, variants.schedule_steps)


def anchor_mass_ratio(metrics: Mapping[str, float]) -> float | None:
    """(mean P) / (mean Z) over the tokens with A < 0, from the metrics of a step; None where there are none.

    The mean of a = P / Z is ruled by the few tokens with the smallest Z, and its median comes out of a
    histogram, in steps of 4.7 %, which a small change never crosses. This one is a with each token weighted
    by its Z, an exact sum over all ranks and micro-batches.
    """
    mass, reference_mass = metrics.get("anchor_mass", math.nan), metrics.get("reference_anchor_mass", 0.0)
    if not (math.isfinite(mass) and reference_mass > 0):
        return None
    return mass / reference_mass


def adapted_pull(pull_coeff: float, ratio: float, cfg: ObjectiveConfig) -> float:
    """pull * exp(rate * (target - ratio) / target), within its bounds: more pull where P is too small."""
    variants = cfg.apo_variants
    assert variants.target_anchor_ratio is not None
    error = (variants.target_anchor_ratio - ratio) / variants.target_anchor_ratio
    moved = pull_coeff * math.exp(variants.adaptation_rate * error)
    return min(max(moved, variants.min_pull_coeff), variants.max_pull_coeff)
