"""The protocol every rollout engine speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:  # an engine does not need the trainer's imports
    from apo_megatron.weights.source import WeightSource

Progress = Callable[[int, int], None]  # so many more completions are done, with so many tokens


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions. ``seed`` makes them reproducible whatever the batching or the layout."""

    num_samples: int  # completions per prompt
    temperature: float
    top_p: float
    top_k: int  # 0 = all tokens
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]  # sampling one of them ends the completion
    seed: int


class RolloutEngine(Protocol):
    """Draws completions with weights that the trainer pushes into it."""

    policy_version: int  # of the weights in use; -1 before the first update_weights

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """``num_samples`` completions for each of *this rank's* prompts, in order (no collective)."""
        ...

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Take the weights from ``source``. Collective: every rank of the trainer calls it."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...
