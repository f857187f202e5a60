"""The order in which a dataset is visited: a pure function of seed and position, so resume is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from apo_megatron.errors import CheckpointError


class EpochOrder:
    """Endless row indices of a dataset, every row once per epoch, reshuffled each epoch.

    A batch may straddle two epochs: no row is dropped and every batch is full. The state is the number of
    rows drawn so far.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0
        self._epoch = -1
        self._rows = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` row indices [count] int64."""
        pieces = []
        while count > 0:
            epoch, start = divmod(self.position, self.num_rows)
            pieces.append(self._rows_of(epoch)[start : start + count])
            self.position += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def _rows_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            self._rows = np.arange(self.num_rows)
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(self._rows)
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """Position and what the order depends on: plain numbers, safe to store as JSON."""
        return {
            "position": self.position,
            "num_rows": self.num_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises CheckpointError where the order would be another one."""
        if "position" not in state:
            raise CheckpointError(
                "the checkpoint's data is a mixture, that of this run is one data set: resume with the same "
                "data.sources, or start anew with checkpoint.resume=never"
            )
        for name, current in self.state_dict().items():
            if name != "position" and state[name] != current:
                raise CheckpointError(
                    f"the checkpoint's data order has {name}={state[name]}, this run has {name}={current}: "
                    "resume with the same data and seed, or start anew with checkpoint.resume=never"
                )
        self.position = state["position"]
