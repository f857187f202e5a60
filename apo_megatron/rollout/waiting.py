"""How the ranks wait for what they draw: together, so that an error on one of them ends the wait of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from apo_megatron.errors import DataError, RewardError, RolloutError
from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import (
    Generation,
    Progress,
    RolloutEngine,
    SampleRequest,
    SamplingParams,
)
from apo_megatron.types import Completion

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

T = TypeVar("T")

POLL_SECONDS = 0.5  # between two looks at the other ranks and at the servers


def on_every_rank(action: Callable[[], T], parallel: World) -> list[T]:
    """Call ``action`` on every rank; the results by rank, on every rank. Collective.

    Where it raises RolloutError, RewardError or DataError on one rank, all raise the same.
    """
    result: T | None = None
    problem: tuple[type[Exception], str] | None = None
    cause = None
    try:
        result = action()
    except (RolloutError, RewardError, DataError) as error:
        problem, cause = (type(error), str(error)), error
    outcomes = all_gather_objects((result, problem), parallel)
    for rank, (_, found) in enumerate(outcomes):
        if found is not None:
            kind, message = found
            raise kind(message if rank == 0 else f"rank {rank}: {message}") from cause
    return [value for value, _ in outcomes]  # type: ignore[misc]


def start_generation(
    engine: RolloutEngine,
    requests: Sequence[SampleRequest],
    sampling: SamplingParams,
    progress: Progress | None = None,
) -> Generation:
    """``engine.start``; what it raises is raised by the first ``wait``, where all ranks hear of it."""
    try:
        return engine.start(requests, sampling, progress)
    except RolloutError as error:
        return _FailedGeneration(error)


def finish_generation(
    generation: Generation,
    engine: RolloutEngine,
    source: WeightSource | None,
    parallel: World,
    finish: Callable[[], T],
    enough: int | None = None,
    num_complete: Callable[[], int] | None = None,
) -> tuple[list[T], bool]:
    """Wait until every rank has its results. Collective; ranks that draw nothing wait with the others.

    A rank calls ``finish`` once its own results are there, while others may still draw; returns what that
    says by rank, and whether everything was drawn to its end. Engines that come back meanwhile get the
    weights of ``source``. What runs is stopped once ``num_complete`` (of this rank) adds up to ``enough``,
    and where no engine has the current weights any more and ``source`` is None. Raises as ``on_every_rank``.
    """
    is_stopped = enough is not None and enough <= 0
    if is_stopped:
        generation.stop()
    results: list[list[T]] = [[] for _ in range(parallel.world)]  # by rank: one, once it is there

    def look() -> tuple[list[T], int]:
        is_done = not results[parallel.rank] and generation.wait(POLL_SECONDS)
        return [finish()] if is_done else [], 0 if num_complete is None else num_complete()

    while True:
        states = on_every_rank(look, parallel)
        for of_rank, (new, _) in zip(results, states, strict=True):
            of_rank += new
        if all(results):
            return [of_rank[0] for of_rank in results], not is_stopped
        if is_stopped:
            continue
        has_enough = enough is not None and sum(count for _, count in states) >= enough
        if has_enough or not (engine.recover(source) or source is not None):
            generation.stop()
            is_stopped = True


class _FailedGeneration:
    """One that could not be started."""

    def __init__(self, error: RolloutError) -> None:
        self._error = error

    def wait(self, seconds: float) -> bool:
        raise self._error

    def num_finished(self) -> int:
        return 0

    def stop(self) -> None: ...

    def results(self) -> list[list[Completion]]:
        raise self._error


class LateProgress:
    """Passes on what is done to the phase that is shown; what is done between two phases, to the next."""

    def __init__(self) -> None:
        self._phase: Progress | None = None
        self._num_samples = self._num_tokens = 0  # not told yet

    def __call__(self, num_samples: int, num_tokens: int) -> None:
        self._num_samples += num_samples
        self._num_tokens += num_tokens
        self._tell()

    @contextmanager
    def told_to(self, phase: Progress | None) -> Iterator[None]:
        """Tell ``phase`` inside (None: nobody wants to know)."""
        self._phase = phase or _ignore
        self._tell()
        try:
            yield
        finally:
            self._phase = None

    def _tell(self) -> None:
        if self._phase is not None and self._num_samples:
            self._phase(self._num_samples, self._num_tokens)
            self._num_samples = self._num_tokens = 0


def _ignore(num_samples: int, num_tokens: int) -> None:
    """A phase that is not shown."""
