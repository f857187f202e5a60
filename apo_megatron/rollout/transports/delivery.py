"""One push of weights to the servers that one rank serves: the order of the calls, and who has failed."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from apo_megatron.parallel.collectives import all_gather_objects
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient
from apo_megatron.rollout.transports.flat_bucket import FlatBucket, pieces
from apo_megatron.weights.source import WeightSource

# On CPUs a server reads a piece of a bucket while the next one is copied. So large that the milliseconds of a
# call do not count; so small that the C library of a server gives it memory which it has used before (up to
# 32 MiB): fresh memory costs more than what is done with it.
PIECE_BYTES = 30 * 2**20

Problems = dict[str, str]  # server name -> what went wrong there
Body = dict[str, Any]


class Delivery:
    """Talks to several servers at once, and leaves out those that have failed from then on."""

    def __init__(
        self, servers: Sequence[SGLangClient], loop: EventLoopThread, timeout: float, label: str
    ) -> None:
        """``timeout`` in seconds holds for each call."""
        self.problems: Problems = {}
        self.label = label
        self._servers = list(servers)
        self._loop = loop
        self._timeout = timeout
        self._in_session: list[SGLangClient] = []

    @property
    def servers(self) -> list[SGLangClient]:
        """Those that have taken everything so far."""
        return [server for server in self._servers if server.name not in self.problems]

    def submit(self, servers: Iterable[SGLangClient], path: str, body: Body) -> Future[None]:
        """POST to several servers at once; done when all have answered, failed, or run out of time."""
        return self._loop.submit(all_of(self._attempt(server, path, body) for server in servers))

    def update_body(self, is_last: bool, **content: Any) -> Body:
        """What the calls that carry weights have in common. The label goes with the last ones only: a server
        that has half of the weights must not show it. Caches are flushed after the push: a server that holds
        requests back would answer that it cannot."""
        return {**content, "flush_cache": False, "weight_version": self.label if is_last else None}

    def begin(self) -> None:
        """Open an update session, which servers want since SGLang 0.5.21; older ones have no such path."""
        self._loop.run(all_of(self._begin(server) for server in self.servers))

    def end(self) -> None:
        """Close the sessions, also where only a part of the weights was taken: such a server takes no other
        update, and some models work only after it. One that is lost is not waited for again."""
        self._loop.run(all_of(self._attempt(server, "/end_weight_update", {}) for server in self._in_session))

    def fail(self, server: SGLangClient, problem: str) -> None:
        """Leave ``server`` out from here on, for a reason that no call has shown."""
        self.problems.setdefault(server.name, problem)

    async def _begin(self, server: SGLangClient) -> None:
        try:
            await self._open_session(server)
        except ServerError as error:
            if error.status != 404:
                self._fail(server, error)
            return
        self._in_session.append(server)

    async def _open_session(self, server: SGLangClient) -> None:
        body = {"selector": "all"}
        try:
            await server.post("/begin_weight_update", body, timeout=self._timeout)
        except ServerError as error:
            if error.status != 400:
                raise
            # A trainer that died in its push has left a session open.
            await server.post("/end_weight_update", {}, timeout=self._timeout)
            await server.post("/begin_weight_update", body, timeout=self._timeout)

    async def _attempt(self, server: SGLangClient, path: str, body: Body) -> None:
        try:
            await server.post(path, body, timeout=self._timeout)
        except ServerError as error:
            self._fail(server, error)

    def _fail(self, server: SGLangClient, error: ServerError) -> None:
        self.problems.setdefault(server.name, str(error))
        if error.is_lost and server in self._in_session:
            self._in_session.remove(server)


async def all_of(attempts: Iterator[Coroutine[Any, Any, None]]) -> None:
    """Run them at once."""
    await asyncio.gather(*attempts)


class BucketTransport(ABC):
    """Sends weights bucket by bucket, while every rank holds each of them: no rank ever has the whole model.

    Each server is served by one rank, different ones by different ranks.
    """

    def __init__(self, parallel: ParallelContext, loop: EventLoopThread, timeout: float) -> None:
        self._parallel = parallel
        self._loop = loop
        self._timeout = timeout
        self._on_cpu = parallel.device.type == "cpu"

    def push(self, source: WeightSource, servers: Sequence[SGLangClient], label: str) -> Problems:
        """See WeightTransport."""
        delivery = Delivery(self._served(servers), self._loop, self._timeout, label)
        delivery.begin()
        self._prepare(source, delivery)
        num_left = len(source.tensor_specs())
        for bucket in source.buckets():
            for piece in pieces(bucket, PIECE_BYTES) if self._on_cpu else [bucket]:
                num_left -= len(piece)
                self._send(FlatBucket(piece), delivery, is_last=num_left == 0)
            del bucket, piece  # before the next one is gathered
        self._finish(delivery)
        delivery.end()
        assert num_left == 0
        return gather_problems(delivery.problems, self._parallel)

    @abstractmethod
    def close(self) -> None:
        """See WeightTransport."""

    def _served(self, servers: Sequence[SGLangClient]) -> Sequence[SGLangClient]:
        """Those that this rank serves."""
        return servers[self._parallel.rank :: self._parallel.world]

    @abstractmethod
    def _prepare(self, source: WeightSource, delivery: Delivery) -> None:
        """Get ready to send; the sessions are open."""

    @abstractmethod
    def _send(self, bucket: FlatBucket, delivery: Delivery, is_last: bool) -> None:
        """Bring a bucket, or on CPUs a piece of one, to ``delivery.servers``; it may go on when this returns.
        Every rank calls it, also one that serves nobody."""

    @abstractmethod
    def _finish(self, delivery: Delivery) -> None:
        """Called when all buckets are sent, before the sessions are closed."""


def gather_problems(problems: Problems, parallel: ParallelContext) -> Problems:
    """Those of all ranks, on every rank. Collective."""
    return {name: text for some in all_gather_objects(problems, parallel) for name, text in some.items()}
