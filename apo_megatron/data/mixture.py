"""Draws from several data sets in proportion to their weights: deterministic, and exact to resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from apo_megatron.data.epochs import EpochOrder
from apo_megatron.errors import CheckpointError


@dataclass(frozen=True)
class MixturePart:
    """One data set of a mixture."""

    name: str
    num_rows: int
    weight: float  # relative to the other parts


class MixtureOrder:
    """Endless row indices of data sets that lie one after the other.

    Each has epochs of its own (a shuffle of its own, every row once). Which one a row comes from is not
    drawn but counted: the next row is of the part that is furthest behind its share (Sainte-Laguë's
    divisors, the smallest (drawn + 1/2) / weight), so that every step has the shares of the weights as
    nearly as whole prompts allow. The state is the number of rows drawn from each part.
    """

    def __init__(self, parts: Sequence[MixturePart], seed: int, shuffle: bool) -> None:
        self._parts = tuple(parts)
        self._seed = seed
        self._shuffle = shuffle
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)])
        # Seeds of their own: data sets of one size would else be shuffled alike.
        seeds = np.random.SeedSequence(seed).generate_state(len(parts))
        self._orders = [
            EpochOrder(part.num_rows, int(part_seed), shuffle)
            for part, part_seed in zip(parts, seeds, strict=True)
        ]

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` row indices [count] int64, over all parts."""
        return np.array([self._next() for _ in range(count)], dtype=np.int64)

    def _next(self) -> int:
        def progress(i: int) -> float:
            return (self._orders[i].position + 0.5) / self._parts[i].weight

        behind = min(range(len(self._parts)), key=progress)  # the first of equals
        return int(self._starts[behind] + self._orders[behind].take(1)[0])

    def state_dict(self) -> dict[str, Any]:
        """Position in each part and what the order depends on: plain numbers, safe to store as JSON."""
        parts = [
            {**asdict(part), "position": order.position}
            for part, order in zip(self._parts, self._orders, strict=True)
        ]
        return {"seed": self._seed, "shuffle": self._shuffle, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. Raises CheckpointError where the order would be another one."""
        saved, current = _description(state), _description(self.state_dict())
        if saved != current:
            raise CheckpointError(
                f"the checkpoint's data is {saved}; that of this run is {current}: resume with the same "
                "data.sources and seed, or start anew with checkpoint.resume=never"
            )
        for order, part in zip(self._orders, state["parts"], strict=True):
            order.position = part["position"]


def _description(state: Mapping[str, Any]) -> str:
    """All that the order depends on, in words."""
    if "parts" not in state:
        return "one data set (data.train_path)"
    parts = [f"{p['name']} ({p['num_rows']} prompts, weight {p['weight']!r})" for p in state["parts"]]
    return f"a mixture of {', '.join(parts)} with seed={state['seed']}, shuffle={state['shuffle']}"
