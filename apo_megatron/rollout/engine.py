"""The protocol every rollout engine speaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:  # an engine does not need the trainer's imports
    import numpy as np

    from apo_megatron.weights.source import WeightSource

Progress = Callable[[int, int], None]  # so many more completions are done, with so many tokens


@dataclass(frozen=True)
class SamplingParams:
    """How to draw completions. ``seed`` makes them reproducible where the engine can."""

    num_samples: int  # completions per prompt
    temperature: float
    top_p: float
    top_k: int  # 0 = all tokens
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]  # sampling one of them ends the completion
    seed: int


@dataclass(frozen=True)
class SampleRequest:
    """What to draw for one prompt: ``num_samples`` new completions, or the rest of one that was stopped."""

    prompt: Prompt
    num_samples: int
    begun: Completion | None = None  # finish_reason "abort"; num_samples is then 1
    first: int = 0  # number of its first sample among those of the prompt that are drawn now


@dataclass(frozen=True)
class Probe:
    """Token sequences and what the actor says about them. An engine with the same weights says the same."""

    token_ids: tuple[np.ndarray, ...]  # each [L] int32, L >= 2
    log_probs: tuple[np.ndarray, ...]  # each [L - 1] float32: of tokens 1..L-1 given those before, T = 1


class Generation(Protocol):
    """Completions that are being drawn for one rank. No method is collective."""

    def wait(self, seconds: float) -> bool:
        """Whether all requests are done, after at most about so many seconds (an engine that shares the
        trainer's process takes as long as it takes). Raises RolloutError where one cannot be answered."""
        ...

    def num_finished(self) -> int:
        """Requests all of whose completions are done."""
        ...

    def stop(self) -> None:
        """End what is still running: ``wait`` soon returns True, and completions that were cut have
        ``finish_reason`` "abort", with the tokens that they have (possibly none)."""
        ...

    def results(self) -> list[list[Completion]]:
        """Completions by request, once ``wait`` has returned True; those of a continued one include the
        tokens that it began with."""
        ...


class RolloutEngine(Protocol):
    """Draws completions with weights that the trainer pushes into it."""

    policy_version: int  # of the weights that the trainer pushed last; -1 before the first update_weights

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> Generation:
        """Begin to draw for *this rank's* requests (no collective). ``sampling.num_samples`` is not read."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """``num_samples`` completions for each of *this rank's* prompts, in order (no collective)."""
        ...

    def update_weights(
        self, source: WeightSource, version: int, probe: Probe | None = None
    ) -> dict[str, float]:
        """Take the weights from ``source``. Collective: every rank of the trainer calls it.

        What runs is stopped first (``Generation.stop``). With ``probe`` the engine's own log-probs are
        compared: the mean difference is returned as the metric ``canary_gap``. Raises RolloutError where it
        is above rollout.max_canary_gap, or where no engine could take the weights in time.
        """
        ...

    def recover(self, source: WeightSource | None) -> bool:
        """Bring engines that came back without the current weights up to date, if there are any. Collective.

        ``source`` must hold the weights of ``policy_version``; None (the trainer has other ones by now) only
        looks. Returns whether an engine serves with those weights, the same on every rank. Cheap where there
        is nothing to do."""
        ...

    def sleep(self) -> None:
        """Leave the devices to the trainer until ``update_weights``: frees weights and KV cache where they
        are shared. Collective."""
        ...

    def close(self) -> None:
        """Free what the engine holds, and end what it started."""
        ...
