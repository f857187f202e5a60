"""Completions that SGLang servers draw for one rank: retries, stops, and what the answers are made into."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any
from uuid import uuid4

import numpy as np

from apo_megatron.errors import RolloutError
from apo_megatron.rollout.engine import Progress, SampleRequest, SamplingParams
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sampling import prompt_seed
from apo_megatron.rollout.sglang_answers import DrawnTokens
from apo_megatron.rollout.sglang_client import DrawRequest, ServerError
from apo_megatron.rollout.sglang_servers import ServerSet
from apo_megatron.types import Completion

FIRST_BACK_OFF_SECONDS = 0.25  # doubled with each failure
MAX_BACK_OFF_SECONDS = 10.0
ABORT_SECONDS = 10.0  # for servers to answer what was aborted; later answers are dropped
ABORT_INTERVAL_SECONDS = 0.5  # an abort that overtakes its request has no effect: it is sent again

Decode = Callable[[list[list[int]]], list[str]]  # token ids without stop tokens -> texts


@dataclass(frozen=True)
class DrawSettings:
    """What all requests of a generation share."""

    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]  # all that end a completion
    policy_version: int
    max_attempts: int
    sends_seeds: bool
    decode: Decode


class SGLangGeneration:
    """Draws ``requests`` in the background from the moment it is made. A ``Generation``."""

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        settings: DrawSettings,
        servers: ServerSet,
        loop: EventLoopThread,
        progress: Progress | None = None,
    ) -> None:
        self._settings = settings
        self._servers = servers
        self._loop = loop
        self._progress = progress
        self._news: deque[tuple[int, int]] = deque()  # (completions, tokens) that progress was not told of
        self._drawings = [_Drawing(request, settings, servers) for request in requests]
        self._results: list[list[Completion] | None] = [None] * len(requests)
        self._num_finished = 0
        self._is_stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._done = loop.submit(self._draw_all())

    def wait(self, seconds: float) -> bool:
        """See ``Generation``. ``progress`` is told from here, on the caller's thread."""
        concurrent.futures.wait([self._done], seconds)
        is_done = self._done.done()  # before the news: there are none after it
        while self._progress is not None and self._news:
            self._progress(*self._news.popleft())
        if is_done:
            self._done.result()
        return is_done

    def wait_for_end(self, seconds: float) -> None:
        """Wait until nothing runs any more, whether it went well or not."""
        concurrent.futures.wait([self._done], seconds)

    def has_ended(self) -> bool:
        return self._done.done()

    def num_finished(self) -> int:
        return self._num_finished

    def stop(self) -> None:
        """End what is still running, with the tokens that it has; returns at once."""
        if not self._done.done():
            self._loop.submit(self._stop())

    def results(self) -> list[list[Completion]]:
        """See ``Generation``."""
        assert all(result is not None for result in self._results), "results are there once wait is True"
        return [result for result in self._results if result is not None]

    async def _draw_all(self) -> None:
        self._tasks = [asyncio.create_task(self._draw(index)) for index in range(len(self._drawings))]
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _draw(self, index: int) -> None:
        drawing = self._drawings[index]
        try:
            completions = drawing.not_drawn() if self._is_stopping else await drawing.draw()
        except asyncio.CancelledError:
            if not self._is_stopping:
                raise
            completions = drawing.not_drawn()
        self._results[index] = completions
        self._num_finished += 1
        self._news.append((len(completions), sum(len(c.token_ids) for c in completions)))

    async def _stop(self) -> None:
        self._is_stopping = True
        for drawing in self._drawings:
            drawing.is_stopping = True
        deadline = monotonic() + ABORT_SECONDS
        await asyncio.sleep(0)  # a task that is cancelled before its first step runs nothing
        while not self._done.done():
            aborts: list[Coroutine[Any, Any, None]] = []
            for drawing, task in zip(self._drawings, self._tasks, strict=True):
                if drawing.server is None or monotonic() > deadline:
                    task.cancel()
                elif not task.done():
                    aborts.append(self._servers.abort(drawing.server, drawing.sent))
            await asyncio.gather(*aborts)
            await asyncio.sleep(ABORT_INTERVAL_SECONDS if aborts else 0.01)


class _Drawing:
    """One request on its way: sent again until there is an answer, or too many failures."""

    def __init__(self, request: SampleRequest, settings: DrawSettings, servers: ServerSet) -> None:
        self._request = request
        self._settings = settings
        self._servers = servers
        self._begun_tokens = np.empty(0, np.int32) if request.begun is None else request.begun.token_ids
        self.is_stopping = False
        self.server: str | None = None  # the one that works on it
        self.sent = self._draw_request()  # as it was sent last

    async def draw(self) -> list[Completion]:
        """Raises RolloutError after max_attempts failures, and for one that no repetition can mend."""
        if self.sent.max_new_tokens <= 0:  # it was stopped with its last token
            assert self._request.begun is not None
            return [replace(self._request.begun, finish_reason="length")]
        failures: list[ServerError] = []
        avoid = None
        while True:
            self.sent = replace(self.sent, request_id=uuid4().hex)
            try:
                return await self._attempt(avoid)
            except ServerError as error:
                if self.is_stopping:
                    return self.not_drawn()
                failures.append(error)
                if len(failures) >= self._settings.max_attempts or not error.retryable:
                    raise RolloutError(self._give_up_message(failures)) from error
                avoid = error.server
            finally:
                self.server = None
            await asyncio.sleep(_back_off_seconds(len(failures)))

    def not_drawn(self) -> list[Completion]:
        """What there is when nothing (more) was drawn."""
        if self._request.begun is not None:
            return [self._request.begun]
        nothing = DrawnTokens(np.empty(0, np.int32), np.empty(0, np.float32), "abort", ())
        return self._completions([nothing] * self._request.num_samples)

    async def _attempt(self, avoid: str | None) -> list[Completion]:
        def note_server(name: str) -> None:
            self.server = name

        drawn = await self._servers.draw(self.sent, self._request.prompt.prompt_id, avoid, note_server)
        assert self.server is not None
        if not self.is_stopping and any(tokens.finish_reason == "abort" for tokens in drawn):
            raise ServerError(self.server, "/generate", "somebody else aborted the request")
        return self._completions(drawn)

    def _draw_request(self) -> DrawRequest:
        request, sampling = self._request, self._settings.sampling
        seeds = None
        if self._settings.sends_seeds:
            # A number in the name, because what one prompt's samples began with may be the same.
            begun = zlib.crc32(self._begun_tokens.tobytes())
            numbers = range(request.first, request.first + request.num_samples)
            names = [f"{request.prompt.prompt_id}/{begun}/{number}" for number in numbers]
            seeds = tuple(prompt_seed(sampling.seed, name) % 2**63 for name in names)
        return DrawRequest(
            request_id="",
            token_ids=np.concatenate([request.prompt.token_ids, self._begun_tokens]).astype(np.int32),
            num_samples=request.num_samples,
            max_new_tokens=sampling.max_new_tokens - len(self._begun_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=self._settings.stop_token_ids,
            seeds=seeds,
        )

    def _completions(self, drawn: Sequence[DrawnTokens]) -> list[Completion]:
        """As the trainer knows them, with what a continued one began with."""
        begun = self._request.begun
        begun_log_probs = np.empty(0, np.float32) if begun is None else begun.log_probs
        begun_versions = () if begun is None else begun.versions
        token_ids = [np.concatenate([self._begun_tokens, tokens.token_ids]) for tokens in drawn]
        texts = self._settings.decode(
            [
                (ids[:-1] if tokens.finish_reason == "stop" else ids).tolist()
                for ids, tokens in zip(token_ids, drawn, strict=True)
            ]
        )
        return [
            Completion(
                token_ids=ids,
                log_probs=np.concatenate([begun_log_probs, tokens.log_probs]),
                text=text,
                finish_reason=tokens.finish_reason,
                versions=merge_versions(begun_versions, self._settings.policy_version, len(tokens.token_ids)),
            )
            for ids, tokens, text in zip(token_ids, drawn, texts, strict=True)
        ]

    def _give_up_message(self, failures: Sequence[ServerError]) -> str:
        shown = "; ".join(str(error) for error in failures[-3:])
        return (
            f"prompt {self._request.prompt.prompt_id!r}: no answer that can be used after {len(failures)} "
            f"attempts (sglang.max_attempts={self._settings.max_attempts}), the last ones: {shown}. "
            f"Servers: {self._servers.describe()}"
        )


def merge_versions(
    versions: Sequence[tuple[int, int]], version: int, num_tokens: int
) -> tuple[tuple[int, int], ...]:
    """``versions`` (version, tokens) and ``num_tokens`` more of ``version``, none of them empty but the only
    one."""
    merged = [(earlier, count) for earlier, count in versions if count > 0]
    if merged and merged[-1][0] == version:
        merged[-1] = (version, merged[-1][1] + num_tokens)
    elif num_tokens > 0 or not merged:
        merged.append((version, num_tokens))
    return tuple(merged)


def _back_off_seconds(num_failures: int) -> float:
    """Doubled with each failure; shared out at random, so that requests do not come back all at once
    (and the process-wide random state stays as it is)."""
    longest = min(MAX_BACK_OFF_SECONDS, FIRST_BACK_OFF_SECONDS * 2 ** (num_failures - 1))
    return longest * random.SystemRandom().uniform(0.5, 1.0)
