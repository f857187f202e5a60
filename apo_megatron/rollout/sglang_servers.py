"""All SGLang servers as one rank sees them: which one a request goes to, and who waits for room."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import RolloutError
from apo_megatron.rollout.balance import Balancer
from apo_megatron.rollout.sglang_answers import DrawnTokens
from apo_megatron.rollout.sglang_client import DrawRequest, ServerError, SGLangClient
from apo_megatron.rollout.sglang_server import Server

ABORT_SECONDS = 5.0  # for the answer to one abort
ATTENTION_SECONDS = 10.0  # a trainer that waits says so more often


class ServerSet:
    """Sends requests to the servers that have the current weights. It lives in one event loop; other threads
    may ask for ``seconds_without_servers`` and ``describe``."""

    def __init__(
        self,
        cfg: SGLangConfig,
        make_client: Callable[[str, str], SGLangClient],
        first: int,
        on_hang: Callable[[str, str], None] | None = None,
    ) -> None:
        """``make_client(name, url)``; ``first``: of equally idle servers the one that is taken first;
        ``on_hang``: see ``Server``."""
        self._cfg = cfg
        self._make_client = make_client
        self._first = first
        self._on_hang = on_hang
        self._servers: dict[str, Server] = {}
        self._router: Server | None = None
        if cfg.router_url is not None:
            client = make_client("router", cfg.router_url)
            self._router = Server(client, cfg, self._usable_changed, is_router=True)
        self._balancer = Balancer()
        self._waiting: dict[asyncio.Future[None], str | None] = {}  # in order; the server to avoid
        self._unusable_since: float | None = monotonic()
        self._waited_for_since = self._waited_for_at = -math.inf  # monotonic seconds
        self.label = ""  # of the current weights

    def __getitem__(self, name: str) -> SGLangClient:
        return self._servers[name].client

    # What there is

    async def addresses(self) -> dict[str, str]:
        """The servers by name with their URLs."""
        return {name: server.client.url for name, server in self._servers.items()}

    async def replace(self, addresses: Mapping[str, str]) -> None:
        """The servers by name with their URLs; what is not among them is given up."""
        for name, server in list(self._servers.items()):
            if addresses.get(name) != server.client.url:
                await server.stop_watching()
                del self._servers[name]
                server.give_up("it was taken out of the list of servers")
        for name, url in addresses.items():
            if name not in self._servers:
                client = self._make_client(name, url)
                self._servers[name] = Server(client, self._cfg, self._usable_changed, self._on_hang)

    async def watch(self) -> None:
        """Look after all of them from now on."""
        for server in self._all():
            server.watch()

    async def stop_watching(self, names: Iterable[str]) -> None:
        """For servers that are to be paused."""
        for name in names:
            await self._servers[name].stop_watching()

    async def close(self) -> None:
        """End what runs in the background."""
        for server in self._all():
            await server.stop_watching()

    async def set_updated(self, label: str, names: Iterable[str], problems: Mapping[str, str]) -> None:
        """``label`` are the current weights: the servers ``names`` have them, those in ``problems`` failed to
        take them. Of the others, those that had them before still do."""
        if label != self.label:
            for server in self._servers.values():
                server.label = None
            self._balancer.forget_prompts()
            self.label = label
            if self._router is not None:
                self._router.label = label
        for name in names:
            self._servers[name].set_updated(label)
        for name, problem in problems.items():
            self._servers[name].set_failed(problem)
        self._usable_changed()

    async def usable(self) -> list[str]:
        """Servers that requests can go to."""
        return [server.name for server in self._servers.values() if server.is_usable]

    async def serves(self) -> bool:
        """Whether some server has the current weights, if not this second: one that has just failed to answer
        may be there again in a moment."""
        latest = monotonic() - self._cfg.health_timeout
        current = [server for server in self._servers.values() if server.label is not None]
        return any(not server.is_lost or server.lost_at > latest for server in current)

    async def behind(self) -> list[str]:
        """Servers that are healthy and wait for the current weights."""
        healthy = [server for server in self._servers.values() if not server.is_lost]
        return [s.name for s in healthy if s.label is None and monotonic() > s.update_after]

    async def reachable(self) -> list[str]:
        """The servers that an update can go to: those that answered when they were last looked at. Those
        that never were are looked at now, and all of them where none answered."""
        servers = list(self._servers.values())
        none_answered = all(server.is_lost for server in servers)
        unknown = [server for server in servers if none_answered or server.last_sign == 0]
        await asyncio.gather(*(server.look() for server in unknown))
        return [server.name for server in servers if not server.is_lost]

    def note_waiting(self) -> None:
        """The trainer waits for answers. While it does not, nobody gives weights to a server that has come
        back, so it counts for nothing that none is usable."""
        now = monotonic()
        if now - self._waited_for_at > ATTENTION_SECONDS:
            self._waited_for_since = now
        self._waited_for_at = now

    def seconds_without_servers(self) -> float:
        """For how long the trainer has waited without a usable server; 0 while there is one."""
        since, now = self._unusable_since, monotonic()
        if since is None or now - self._waited_for_at > ATTENTION_SECONDS:
            return 0.0
        return now - max(since, self._waited_for_since)

    def describe(self) -> str:
        """What is known about each server, for a status line or an error."""
        return "; ".join(server.describe() for server in self._all()) or "there is none"

    # Requests

    async def draw(
        self, request: DrawRequest, prompt_id: str, avoid: str | None, sent: Callable[[str], None]
    ) -> list[DrawnTokens]:
        """The completions of ``request`` by some server, drawn with the current weights.

        Waits for a server with room, another one than ``avoid`` where another one is usable. ``sent`` is told
        the server before the request goes there. Raises ServerError where that server does not answer as it
        should, and RolloutError where none at all was usable for unavailable_timeout.
        """
        num_tokens = len(request.token_ids) + request.num_samples * request.max_new_tokens
        server = await self._acquire(prompt_id, num_tokens, avoid)
        try:
            sent(server.name)
            return await server.draw(request)
        finally:
            server.num_requests -= 1
            self._balancer.release(server.name, num_tokens)
            self._wake_one()

    async def abort(self, name: str, request: DrawRequest) -> None:
        """End a request that was sent to server ``name``; behind a router it may be at any of them."""
        for server in list(self._servers.values()):
            if server.name == name or self._router is not None:
                try:
                    await server.client.abort(request, ABORT_SECONDS)
                except ServerError:
                    pass  # the request itself will show what is wrong there

    async def _acquire(self, prompt_id: str, num_tokens: int, avoid: str | None) -> Server:
        while True:
            candidates = {server.name: server for server in self._candidates(avoid)}
            if candidates:
                server = candidates[self._balancer.choose(prompt_id, num_tokens, list(candidates))]
                server.num_requests += 1
                return server
            await self._wait_for_room(avoid)
            if self.seconds_without_servers() > self._cfg.unavailable_timeout:
                raise RolloutError(
                    f"no SGLang server was usable for {self._cfg.unavailable_timeout:g} s "
                    f"(sglang.unavailable_timeout): {self.describe()}"
                )

    def _candidates(self, avoid: str | None) -> list[Server]:
        """The servers that may get a request, in the order in which they are taken."""
        usable = [server for server in self._servers.values() if server.is_usable]
        limit = self._cfg.max_concurrent_requests
        if self._router is not None and usable:
            limit *= len(usable)
            usable = [self._router] if self._router.is_usable else []
        # Strictly: a server that fails at once always has room, and would draw all retries to itself.
        usable = [server for server in usable if server.name != avoid] or usable
        start = self._first % len(usable) if usable else 0
        return [server for server in usable[start:] + usable[:start] if server.num_requests < limit]

    async def _wait_for_room(self, avoid: str | None) -> None:
        """Until there may be room, or patience may be over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = avoid
        patience = self._cfg.unavailable_timeout - self.seconds_without_servers()
        try:
            async with asyncio.timeout(max(0.0, patience) + 0.05):
                await waiter
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake_one()  # the room that this one was told of is for another
            raise
        finally:
            self._waiting.pop(waiter, None)

    def _wake_one(self) -> None:
        """There is room: wake the first that can use it."""
        for waiter, avoid in self._waiting.items():
            if not waiter.done() and self._candidates(avoid):
                del self._waiting[waiter]
                waiter.set_result(None)
                return

    def _usable_changed(self) -> None:
        usable = any(server.is_usable for server in self._servers.values())
        if usable and (self._router is None or self._router.is_usable):
            self._unusable_since = None
        elif self._unusable_since is None:
            self._unusable_since = monotonic()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _all(self) -> list[Server]:
        return [*self._servers.values(), *([] if self._router is None else [self._router])]
