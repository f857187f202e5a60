"""One weight update of SGLang servers, and the proof that it arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar
from uuid import uuid4

import numpy as np

from apo_megatron.errors import RolloutError
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import Probe
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ASLEEP, ServerError, SGLangClient
from apo_megatron.rollout.waiting import on_every_rank

if TYPE_CHECKING:
    from apo_megatron.rollout.transport import WeightTransport
    from apo_megatron.weights.source import WeightSource

T = TypeVar("T")
Problems = dict[str, str]  # server name -> what went wrong there

MEMORY_TAGS = ("weights", "kv_cache")  # in the order in which they are taken back
UNFINISHED = "unfinished"  # label of a server that an update has failed at


@dataclass(frozen=True)
class Proof:
    """What a server with new weights says."""

    mean_log_prob: float  # of the probe's tokens, nats; 0 without a probe
    canary_gap: float  # mean |difference| to the actor's, nats; 0 without a probe
    checksum: str | None


@dataclass(frozen=True)
class UpdateOutcome:
    """The same on every rank."""

    proofs: dict[str, Proof]  # of the servers that have the weights now
    problems: Problems  # of those that do not
    unchanged: tuple[str, ...] = ()  # servers with the checksum that they had under the label before


class Updater(Protocol):
    """Sees to it that servers have the weights that the engine wants. Every rank has one."""

    def new_label(self, servers: Sequence[SGLangClient], version: int) -> str:
        """What the weights of ``version`` are called; "" where no server can tell. Collective."""
        ...

    def update(
        self, servers: Sequence[SGLangClient], source: WeightSource, label: str, probe: Probe | None
    ) -> UpdateOutcome:
        """``servers`` have the weights ``label`` now, but those with problems. Collective; RolloutError on
        every rank where one has others and always will."""
        ...

    def put_to_sleep(self, servers: Sequence[SGLangClient]) -> Problems:
        """Have servers release their memory. Collective."""
        ...

    def close(self) -> None:
        """Free what is held. Not collective."""
        ...


class WeightUpdater:
    """Brings weights into servers: pause, transfer, flush, continue, canary.

    Every rank has one; rank 0 gives the orders. Where servers are colocated, ``put_to_sleep`` frees their
    memory, and an update takes it back: that of the weights before the transfer, that of the KV cache after.
    """

    def __init__(
        self,
        parallel: World,
        loop: EventLoopThread,
        transport: WeightTransport,
        max_canary_gap: float,
    ) -> None:
        self._parallel = parallel
        self._loop = loop
        self._transport = transport
        self._max_canary_gap = max_canary_gap
        # Rank 0: server name -> tags of the memory that it has released. One that was started anew, or that
        # another trainer has put to sleep, is known by its label.
        self._released: dict[str, list[str]] = {}
        self._checksums: dict[str, str] = {}  # of servers with the label ...
        self._label = ""
        self._run_id = run_on_main(lambda: uuid4().hex[:8], parallel)
        self._previous: dict[str, str] = {}  # checksums of servers under the label before

    def new_label(self, servers: Sequence[SGLangClient], version: int) -> str:
        """The label of a new policy version, which no other run gives."""
        return f"{self._run_id}-{version}"

    def update(
        self, servers: Sequence[SGLangClient], source: WeightSource, label: str, probe: Probe | None
    ) -> UpdateOutcome:
        """Collective, with the same servers on every rank; nobody looks at their health meanwhile.

        Raises RolloutError on every rank where a server does not say what the ``probe`` says, or where
        servers with the same weights have different checksums.
        """
        problems = self._on_main(lambda: on_each(self._loop, servers, self._pause)[1])
        paused = [server for server in servers if server.name not in problems]
        if paused:
            problems = {**problems, **self._transport.push(source, paused, label)}
        updated = [server for server in paused if server.name not in problems]

        def finish() -> tuple[dict[str, Proof], Problems]:
            proofs, more = on_each(self._loop, updated, lambda server: self._finish(server, label, probe))
            failed = [server for server in servers if server.name in {**problems, **more}]
            on_each(self._loop, failed, self._go_on)
            return proofs, more

        proofs, more = self._on_main(finish)
        self._require_agreement(proofs, label, probe)
        unchanged = tuple(
            name
            for name, proof in proofs.items()
            if proof.checksum and proof.checksum == self._previous.get(name)
        )
        return UpdateOutcome(proofs, {**problems, **more}, unchanged)

    def put_to_sleep(self, servers: Sequence[SGLangClient]) -> Problems:
        """Have servers release their memory. Collective."""

        async def sleep(server: SGLangClient) -> None:
            await server.pause()
            await server.flush_cache()  # refused while anything runs, which must not lose its memory
            await server.release_memory()
            self._released[server.name] = list(MEMORY_TAGS)
            await server.set_weight_label(ASLEEP)

        return self._on_main(lambda: on_each(self._loop, servers, sleep)[1])

    def close(self) -> None:
        """Free what the transport holds. Not collective."""
        self._transport.close()

    async def _pause(self, server: SGLangClient) -> None:
        await server.pause()
        if await server.weight_label() != ASLEEP:
            self._released.pop(server.name, None)
        else:
            self._released.setdefault(server.name, list(MEMORY_TAGS))
        await self._wake(server, "weights")

    async def _finish(self, server: SGLangClient, label: str, probe: Probe | None) -> Proof:
        await self._wake(server, "kv_cache")
        await server.flush_cache()
        await server.resume()
        found = await server.weight_label()
        if found != label:
            raise ServerError(server.name, "/model_info", f"weights {found} after an update to {label}")
        mean_log_prob = canary_gap = 0.0
        if probe is not None:
            scores = await server.score(probe.token_ids)
            if scores.weight_labels != {label}:
                raise ServerError(server.name, "/generate", f"scored with {sorted(scores.weight_labels)}")
            said = np.concatenate(scores.log_probs)
            mean_log_prob = float(said.mean())
            canary_gap = float(np.abs(said - np.concatenate(probe.log_probs)).mean())
        return Proof(mean_log_prob, canary_gap, await server.checksum())

    async def _go_on(self, server: SGLangClient) -> None:
        """After an update that failed: paused, or without its memory, it would pass no health check. It may
        have the new label already, but is not to be taken for one that is up to date."""
        for tag in MEMORY_TAGS:
            await self._wake(server, tag)
        with suppress(ServerError):  # an old server has no such call
            await server.set_weight_label(UNFINISHED)
        await server.resume()

    async def _wake(self, server: SGLangClient, tag: str) -> None:
        tags = self._released.get(server.name, [])
        if tag in tags:
            tags.remove(tag)  # whatever comes of it: asking twice ends a server
            await server.resume_memory(tag)

    def _require_agreement(self, proofs: dict[str, Proof], label: str, probe: Probe | None) -> None:
        for name, proof in proofs.items():
            if probe is not None and not proof.canary_gap <= self._max_canary_gap:  # true of NaN, too
                actor = float(np.concatenate(probe.log_probs).mean())
                raise RolloutError(
                    f"after the update to {label} the log-probs of server {name} differ from the actor's by "
                    f"{proof.canary_gap:.4g} nats on average, more than rollout.max_canary_gap="
                    f"{self._max_canary_gap:.4g} (means: actor {actor:.4f}, server "
                    f"{proof.mean_log_prob:.4f}): the weights did not arrive as they are, or the two compute "
                    "differently (another dtype or model?)"
                )
        if label != self._label:
            self._label, self._previous, self._checksums = label, self._checksums, {}
        for name, proof in proofs.items():
            before = self._checksums.get(name)
            if before is not None and proof.checksum not in (None, before):
                raise RolloutError(
                    f"server {name} came back and took the weights {label} again, but their checksum is "
                    f"{proof.checksum}, not {before} as before: it did not take them as they are"
                )
        self._checksums |= {name: p.checksum for name, p in proofs.items() if p.checksum is not None}
        by_size: dict[str, dict[str, str]] = {}
        for name, checksum in self._checksums.items():
            digest, _, size = checksum.partition(" ")
            by_size.setdefault(size, {}).setdefault(digest, name)
        for names in by_size.values():
            if len(names) > 1:
                found = ", ".join(f"{name}: {digest[:16]}" for digest, name in names.items())
                raise RolloutError(
                    f"after the update to {label} checksums of servers' weights differ ({found}): "
                    "at least one of them did not take them as they are"
                )

    def _on_main(self, action: Callable[[], T]) -> T:
        return run_on_main(action, self._parallel)


def on_each(
    loop: EventLoopThread,
    servers: Sequence[SGLangClient],
    action: Callable[[SGLangClient], Awaitable[T]],
) -> tuple[dict[str, T], Problems]:
    """``action`` on all servers at once: results of those where it went well, problems of the others.

    Raises RolloutError for a problem that no repetition can mend.
    """

    async def attempt(server: SGLangClient) -> T | ServerError:
        try:
            return await action(server)
        except ServerError as error:
            if not error.retryable:  # a wrong key, or no SGLang server at all
                raise RolloutError(str(error)) from error
            return error

    async def attempt_all() -> list[T | ServerError]:
        return await asyncio.gather(*(attempt(server) for server in servers))

    outcomes = dict(zip([s.name for s in servers], loop.run(attempt_all()), strict=True))
    problems = {name: str(found) for name, found in outcomes.items() if isinstance(found, ServerError)}
    return {n: found for n, found in outcomes.items() if not isinstance(found, ServerError)}, problems


def run_on_main(action: Callable[[], T], parallel: World) -> T:
    """What ``action`` returns on rank 0, or the RolloutError that it raises there, on every rank."""
    found = on_every_rank(lambda: action() if parallel.is_main else None, parallel)[0]
    return found  # type: ignore[return-value]
