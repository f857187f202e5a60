"""The servers as one rank sees them: which can be used, how busy they are, and whether they still live."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic

from apo_megatron.config.rollout import SGLangConfig
from apo_megatron.errors import RolloutError
from apo_megatron.rollout.balance import Balancer
from apo_megatron.rollout.sglang_answers import DrawnTokens
from apo_megatron.rollout.sglang_client import DrawRequest, ServerError, SGLangClient

LOST_RETRY_SECONDS = 1.0  # between two looks at a server that does not answer
ABORT_SECONDS = 5.0  # for the answer to one abort
SLOW_REFUSAL_SECONDS = 15.0  # a server whose scheduler hangs says so itself, after 20 s


class Server:
    """One server, and what this rank knows about it."""

    def __init__(self, client: SGLangClient) -> None:
        self.client = client
        self.is_current = False  # the last weight update went through there
        self.is_lost = True  # it has not answered, and has passed no health check since
        self.lost_at = 0.0  # monotonic seconds
        self.problem = "not looked at yet"  # the last thing that went wrong there
        self.last_sign = 0.0  # monotonic seconds of its last answer that took the model; 0 = none yet
        self.update_after = 0.0  # monotonic seconds; an update just failed there
        self.running: set[asyncio.Task[list[DrawnTokens]]] = set()
        self.num_requests = 0
        self.look_now = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def is_usable(self) -> bool:
        return self.is_current and not self.is_lost

    def describe(self) -> str:
        state = "usable" if self.is_usable else "lost" if self.is_lost else "without the current weights"
        return f"{self.name} ({self.client.url}): {state}{f', {self.problem}' if self.problem else ''}"


class ServerSet:
    """Sends requests to the servers that have the current weights. Lives in one event loop.

    A server that fails to answer is left alone until it passes a health check with the label of the current
    weights. One that has requests under way is looked at when it has been silent for health_interval; what
    it has under way is given up when it does not answer then.
    """

    def __init__(
        self,
        cfg: SGLangConfig,
        make_client: Callable[[str, str], SGLangClient],
        first: int,
        on_hang: Callable[[str, str], None] | None = None,
    ) -> None:
        """``make_client(name, url)``; ``first``: of equally idle servers the one that is taken first.

        With ``on_hang`` idle servers are looked at too, and it is told (name, problem) of one that keeps a
        health check waiting: a dead one refuses at once.
        """
        self._cfg = cfg
        self._make_client = make_client
        self._on_hang = on_hang
        self._first = first
        self._servers: dict[str, Server] = {}
        self._router = None if cfg.router_url is None else Server(make_client("router", cfg.router_url))
        self._balancer = Balancer()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._unusable_since: float | None = monotonic()
        self.label = ""  # of the current weights

    def __getitem__(self, name: str) -> SGLangClient:
        return self._servers[name].client

    async def addresses(self) -> dict[str, str]:
        """The servers by name with their URLs."""
        return {name: server.client.url for name, server in self._servers.items()}

    async def usable(self) -> list[str]:
        """Servers that requests can go to."""
        return [server.name for server in self._servers.values() if server.is_usable]

    async def replace(self, addresses: Mapping[str, str]) -> None:
        """The servers by name with their URLs; what is not among them is given up."""
        for name, server in list(self._servers.items()):
            if addresses.get(name) != server.client.url:
                await self.stop_watching([name])
                del self._servers[name]
                self._give_up(server, "it was taken out of the list of servers")
        for name, url in addresses.items():
            if name not in self._servers:
                self._servers[name] = Server(self._make_client(name, url))
        self._usable_changed()

    async def watch(self) -> None:
        """Look at the servers from now on; and at the router, where there is one."""
        for server in self._all():
            if server.watch is None:
                server.watch = asyncio.create_task(self._watch(server))

    async def stop_watching(self, names: Iterable[str]) -> None:
        """Servers that are paused or asleep answer no health check."""
        await self._end_watches([self._servers[name] for name in names])

    async def close(self) -> None:
        """End what runs in the background."""
        await self._end_watches(self._all())

    async def set_updated(self, label: str, names: Iterable[str], problems: Mapping[str, str]) -> None:
        """``label`` are the current weights: the servers ``names`` have them, those in ``problems`` failed to
        take them, and of the others everything is as it was if it is the same label."""
        if label != self.label:
            for server in self._servers.values():
                server.is_current = False
            self._balancer.forget_prompts()
            self.label = label
        for name in names:
            server = self._servers[name]
            server.is_current, server.is_lost, server.problem = True, False, ""
            server.last_sign = monotonic()
        for name, problem in problems.items():
            server = self._servers[name]
            server.is_current, server.is_lost, server.problem = False, True, problem
            server.update_after = monotonic() + self._cfg.health_interval
        self._usable_changed()

    async def reachable(self) -> list[str]:
        """The servers that an update can go to: those that answered when they were last looked at. Those
        that never were are looked at now, and all of them where none answered."""
        servers = list(self._servers.values())
        answered = [server for server in servers if not server.is_lost]
        unknown = [server for server in servers if server.last_sign == 0] if answered else servers
        await asyncio.gather(*(self._look(server) for server in unknown))
        return [server.name for server in servers if not server.is_lost]

    async def serves(self) -> bool:
        """Whether some server has the current weights, if not this second: one that has just failed to answer
        may be there again in a moment."""
        latest = monotonic() - self._cfg.health_timeout
        servers = self._servers.values()
        return any(s.is_current and (not s.is_lost or s.lost_at > latest) for s in servers)

    async def behind(self) -> list[str]:
        """Servers that are healthy and wait for the current weights."""
        now = monotonic()
        return [
            server.name
            for server in self._servers.values()
            if not (server.is_current or server.is_lost)
            and server.last_sign > 0
            and now > server.update_after
        ]

    async def draw(
        self, request: DrawRequest, prompt_id: str, avoid: str | None, sent: Callable[[str], None]
    ) -> list[DrawnTokens]:
        """The completions of ``request`` by some server, drawn with the current weights.

        Waits for a server with room; prefers another one than ``avoid``. ``sent`` is told the server before
        the request goes there. Raises ServerError where that server does not answer as it should, and
        RolloutError where none at all was usable for unavailable_timeout.
        """
        num_tokens = len(request.token_ids) + request.num_samples * request.max_new_tokens
        server = await self._acquire(prompt_id, num_tokens, avoid)
        try:
            sent(server.name)
            return await self._send(server, request)
        finally:
            server.num_requests -= 1
            self._balancer.release(server.name, num_tokens)
            self._wake(1)

    async def abort(self, name: str, request: DrawRequest) -> None:
        """End a request that was sent to server ``name``; behind a router it may be at any of them."""
        if self._router is not None:
            servers = [server for server in self._servers.values() if server.is_usable]
        else:
            servers = [server for server in [self._servers.get(name)] if server is not None]
        for server in servers:
            try:
                await server.client.abort(request, ABORT_SECONDS)
            except ServerError:
                pass  # the request itself will show what is wrong there

    def seconds_without_servers(self) -> float:
        """How long no server was usable; 0 while one is. (May be called from any thread.)"""
        since = self._unusable_since
        return 0.0 if since is None else monotonic() - since

    def describe(self) -> str:
        """What is known about each server, for a status line or an error. (From any thread.)"""
        return "; ".join(server.describe() for server in list(self._servers.values())) or "there is none"

    # Choosing a server

    async def _acquire(self, prompt_id: str, num_tokens: int, avoid: str | None) -> Server:
        while True:
            candidates = self._candidates(avoid)
            if candidates:
                name = self._balancer.choose(prompt_id, num_tokens, list(candidates))
                candidates[name].num_requests += 1
                return candidates[name]
            await self._wait_for_change()
            if self.seconds_without_servers() > self._cfg.unavailable_timeout:
                raise RolloutError(
                    f"no SGLang server was usable for {self._cfg.unavailable_timeout:g} s "
                    f"(sglang.unavailable_timeout): {self.describe()}"
                )

    def _candidates(self, avoid: str | None) -> dict[str, Server]:
        """The servers with room for a request, in the order in which they are taken."""
        usable = [server for server in self._servers.values() if server.is_usable]
        limit = self._cfg.max_concurrent_requests
        if self._router is not None and usable:
            limit *= len(usable)
            usable = [] if self._router.is_lost else [self._router]
        usable = [server for server in usable if server.name != avoid] or usable
        start = self._first % len(usable) if usable else 0
        return {s.name: s for s in usable[start:] + usable[:start] if s.num_requests < limit}

    async def _wait_for_change(self) -> None:
        """Until a server has room, or the set of usable ones has changed, or patience may be over."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        patience = self._cfg.unavailable_timeout - self.seconds_without_servers()
        try:
            await asyncio.wait_for(waiter, max(0.0, patience) + 0.05)
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake(1)  # the room that this one was told of is for another
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _wake(self, count: int) -> None:
        while self._waiting and count > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    def _usable_changed(self) -> None:
        usable = any(server.is_usable for server in self._servers.values())
        if usable:
            self._unusable_since = None
        elif self._unusable_since is None:
            self._unusable_since = monotonic()
        self._wake(len(self._waiting))

    # Talking to it

    async def _send(self, server: Server, request: DrawRequest) -> list[DrawnTokens]:
        label = self.label
        answer = asyncio.create_task(server.client.draw(request))
        server.running.add(answer)
        try:
            completions = await answer
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServerError(server.name, "/generate", f"given up: {server.problem}", is_lost=True) from None
        except ServerError as error:
            if error.is_lost:
                self._lose(server, error.problem)
            raise
        finally:
            server.running.discard(answer)
        server.last_sign = monotonic()
        found = {label for completion in completions for label, _ in completion.weight_labels}
        if found != {label}:
            problem = f"drawn with the weights {', '.join(sorted(found))}, expected {label}"
            if server is not self._router:  # which does not say whose answer it was
                self._outdate(server, problem)
            raise ServerError(server.name, "/generate", problem)
        return completions

    def _lose(self, server: Server, problem: str) -> None:
        """It did not answer: use it no more until a look at it, at once, says otherwise."""
        if not server.is_lost:
            server.is_lost, server.lost_at = True, monotonic()
            server.look_now.set()
        server.problem = problem
        self._usable_changed()

    def _outdate(self, server: Server, problem: str) -> None:
        server.is_current, server.problem = False, problem
        self._usable_changed()

    def _give_up(self, server: Server, problem: str) -> None:
        """What the server has under way will not be answered."""
        self._lose(server, problem)
        for answer in server.running:
            answer.cancel()

    # Signs of life

    def _all(self) -> list[Server]:
        return [*self._servers.values(), *([] if self._router is None else [self._router])]

    async def _end_watches(self, servers: Sequence[Server]) -> None:
        watches = [server.watch for server in servers if server.watch is not None]
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        for server in servers:
            server.watch = None

    async def _watch(self, server: Server) -> None:
        interval = self._cfg.health_interval
        while True:
            try:
                pause = min(LOST_RETRY_SECONDS, interval) if server.is_lost else interval
                await asyncio.wait_for(server.look_now.wait(), pause)
            except TimeoutError:
                pass
            server.look_now.clear()
            is_silent = monotonic() - server.last_sign >= interval
            if server.is_lost or (is_silent and (server.running or self._on_hang is not None)):
                await self._look(server)

    async def _look(self, server: Server) -> None:
        timeout = self._cfg.health_timeout
        began = monotonic()
        try:
            await server.client.check_health(timeout)
            label = self.label if server is self._router else await server.client.weight_label()
        except ServerError as error:
            self._give_up(server, error.problem)
            if self._on_hang is not None and monotonic() - began >= min(timeout, SLOW_REFUSAL_SECONDS):
                self._on_hang(server.name, error.problem)
            return
        server.last_sign = monotonic()
        if server.is_lost:
            server.is_lost, server.problem = False, ""
            self._usable_changed()
        if label != self.label and server.is_current:
            self._outdate(server, f"it has the weights {label}")
