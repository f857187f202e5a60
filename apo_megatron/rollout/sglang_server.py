"""One SGLang server as one rank sees it: whether it lives, and whether it has the current weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.rollout.sglang_answers import DrawnTokens
from apo_megatron.rollout.sglang_client import ASLEEP, DrawRequest, ServerError, SGLangClient

LOST_RETRY_SECONDS = 1.0  # between two looks at a server that does not answer
SLOW_REFUSAL_SECONDS = 15.0  # a server whose scheduler hangs says so itself, after 20 s


class Server:
    """Draws as long as it answers, with the weights that it should have.

    One that fails to answer is lost until it passes a health check; one that has other weights is out of date
    until ``label`` is set again. It lives in one event loop.
    """

    def __init__(
        self,
        client: SGLangClient,
        cfg: SGLangConfig,
        changed: Callable[[], None],
        on_hang: Callable[[str, str], None] | None = None,
        is_router: bool = False,
    ) -> None:
        """``changed`` is told that it became usable, or is so no more.

        With ``on_hang`` it is looked at while it has nothing to do, too, and ``on_hang(name, problem)`` is
        told when it keeps a health check waiting: a dead one refuses at once. A router answers for others:
        its answers may be out of date, it never is.
        """
        self.client = client
        self.label: str | None = None  # of the current weights, where the last update gave it those
        self.is_lost = True
        self.lost_at = 0.0  # monotonic seconds
        self.problem = "not looked at yet"  # the last thing that went wrong
        self.last_sign = 0.0  # monotonic seconds of its last answer that took the model; 0 = none yet
        self.update_after = 0.0  # monotonic seconds; an update has just failed
        self.num_requests = 0
        self._cfg = cfg
        self._changed = changed
        self._on_hang = on_hang
        self._is_router = is_router
        self._running: set[asyncio.Task[list[DrawnTokens]]] = set()
        self._look_now = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def is_usable(self) -> bool:
        return self.label is not None and not self.is_lost

    def describe(self) -> str:
        state = "usable" if self.is_usable else "lost" if self.is_lost else "without the current weights"
        return f"{self.name} ({self.client.url}): {state}{f', {self.problem}' if self.problem else ''}"

    async def draw(self, request: DrawRequest) -> list[DrawnTokens]:
        """Completions that were drawn with the current weights. Raises ServerError."""
        label = self.label
        answer = asyncio.create_task(self.client.draw(request))
        self._running.add(answer)
        try:
            completions = await answer
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerError(self.name, "/generate", f"given up: {self.problem}", is_lost=True) from None
        except ServerError as error:
            if error.is_lost:
                self._lose(error.problem)
            raise
        finally:
            self._running.discard(answer)
        self.last_sign = monotonic()
        self._require_label(completions, label)
        return completions

    def set_updated(self, label: str) -> None:
        """An update went through: it has the weights ``label`` and answers."""
        self.label, self.is_lost, self.problem = label, False, ""
        self.last_sign = monotonic()
        self._changed()

    def set_failed(self, problem: str) -> None:
        """An update did not go through. The next one waits a little."""
        self.label, self.update_after = None, monotonic() + self._cfg.health_interval
        self._lose(problem)

    def set_outdated(self, problem: str) -> None:
        """It has other weights than the current ones."""
        self.label, self.problem = None, problem
        self._changed()

    def give_up(self, problem: str) -> None:
        """What it has under way will not be answered."""
        self._lose(problem)
        for answer in self._running:
            answer.cancel()

    def watch(self) -> None:
        """Look at it from now on, when it has been silent for health_interval."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_looking())

    async def stop_watching(self) -> None:
        """Paused or asleep it answers no health check."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None

    async def look(self) -> None:
        """One health check."""
        began = monotonic()
        try:
            label = None if self._is_router else await self.client.weight_label()
            if label != ASLEEP:  # then only an update helps it
                await self.client.check_health(self._cfg.health_timeout)
        except ServerError as error:
            self.give_up(error.problem)
            patience = min(self._cfg.health_timeout, SLOW_REFUSAL_SECONDS)
            if self._on_hang is not None and monotonic() - began >= patience:
                self._on_hang(self.name, error.problem)
                await self._end_pause()
            return
        self.last_sign = monotonic()
        if self.is_lost:
            self.is_lost, self.problem = False, ""
            self._changed()
        if not self._is_router and self.label not in (None, label):
            self.set_outdated(f"it has the weights {label}")

    async def _end_pause(self) -> None:
        """A trainer that died in an update has left it paused, if it does not hang."""
        with suppress(ServerError):
            await self.client.resume()

    def _lose(self, problem: str) -> None:
        """It did not answer. A look at it, at once, may say otherwise."""
        if not self.is_lost:
            self.is_lost, self.lost_at = True, monotonic()
            self._look_now.set()
        self.problem = problem
        self._changed()

    def _require_label(self, completions: Sequence[DrawnTokens], label: str | None) -> None:
        found = {name for tokens in completions for name, count in tokens.weight_labels if count > 0}
        if not found <= {label}:
            problem = f"drawn with the weights {', '.join(sorted(found))}, expected {label}"
            if not self._is_router:
                self.set_outdated(problem)
            raise ServerError(self.name, "/generate", problem)

    async def _keep_looking(self) -> None:
        interval = self._cfg.health_interval
        while True:
            try:
                pause = min(LOST_RETRY_SECONDS, interval) if self.is_lost else interval
                async with asyncio.timeout(pause):  # wait_for would lose a cancellation at the wrong moment
                    await self._look_now.wait()
            except TimeoutError:
                pass
            self._look_now.clear()
            is_silent = monotonic() - self.last_sign >= interval
            if self.is_lost or (is_silent and (self._running or self._on_hang is not None)):
                await self.look()
