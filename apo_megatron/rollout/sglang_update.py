"""One weight update of SGLang servers, and the proof that it arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from apo_megatron.errors import RolloutError
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import Probe
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient
from apo_megatron.rollout.waiting import on_every_rank

if TYPE_CHECKING:
    from apo_megatron.rollout.transport import WeightTransport
    from apo_megatron.weights.source import WeightSource

T = TypeVar("T")
Problems = dict[str, str]  # server name -> what went wrong there


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
        # Rank 0: server name -> (label of its weights then, tags of the memory that it has released).
        self._asleep: dict[str, tuple[str, list[str]]] = {}
        self._checksums: dict[str, str] = {}  # of servers with the label ...
        self._label = ""

    def update(
        self, servers: Sequence[SGLangClient], source: WeightSource, label: str, probe: Probe | None
    ) -> UpdateOutcome:
        """Collective, with the same servers on every rank; nobody looks at their health meanwhile.

        Raises RolloutError on every rank where a server does not say what the ``probe`` says, or where
        servers with the same weights have different checksums.
        """
        problems = self._on_main(lambda: self._each(servers, self._pause)[1])
        paused = [server for server in servers if server.name not in problems]
        if paused:
            problems = {**problems, **self._transport.push(source, paused, label)}
        updated = [server for server in paused if server.name not in problems]

        def finish() -> tuple[dict[str, Proof], Problems]:
            proofs, more = self._each(updated, lambda server: self._finish(server, label, probe))
            failed = [server for server in servers if server.name in {**problems, **more}]
            self._each(failed, lambda server: server.resume())  # paused, it would pass no health check
            return proofs, more

        proofs, more = self._on_main(finish)
        self._require_agreement(proofs, label, probe)
        return UpdateOutcome(proofs, {**problems, **more})

    def put_to_sleep(self, servers: Sequence[SGLangClient]) -> Problems:
        """Have servers release their memory. Collective."""

        async def sleep(server: SGLangClient) -> None:
            label = await server.weight_label()
            await server.pause()
            await server.flush_cache()  # refused while anything runs, which must not lose its memory
            await server.release_memory()
            self._asleep[server.name] = (label, ["weights", "kv_cache"])

        return self._on_main(lambda: self._each(servers, sleep)[1])

    async def _pause(self, server: SGLangClient) -> None:
        await server.pause()
        label, _ = self._asleep.get(server.name, ("", []))
        if label and await server.weight_label() != label:
            del self._asleep[server.name]  # it was started anew: nothing is released
        await self._wake(server, "weights")

    async def _finish(self, server: SGLangClient, label: str, probe: Probe | None) -> Proof:
        await self._wake(server, "kv_cache")
        self._asleep.pop(server.name, None)
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

    async def _wake(self, server: SGLangClient, tag: str) -> None:
        _, tags = self._asleep.get(server.name, ("", []))
        if tag in tags:
            await server.resume_memory(tag)
            tags.remove(tag)

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
            self._label, self._checksums = label, {}
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

    def _each(
        self, servers: Sequence[SGLangClient], action: Callable[[SGLangClient], Awaitable[T]]
    ) -> tuple[dict[str, T], Problems]:
        """``action`` on all servers at once: results of those where it went well, problems of the others."""

        async def attempt(server: SGLangClient) -> T | ServerError:
            try:
                return await action(server)
            except ServerError as error:
                if not error.retryable:  # a wrong key, or no SGLang server at all
                    raise RolloutError(str(error)) from error
                return error

        async def attempt_all() -> list[T | ServerError]:
            return await asyncio.gather(*(attempt(server) for server in servers))

        outcomes = dict(zip([s.name for s in servers], self._loop.run(attempt_all()), strict=True))
        problems = {name: str(found) for name, found in outcomes.items() if isinstance(found, ServerError)}
        return {n: found for n, found in outcomes.items() if not isinstance(found, ServerError)}, problems

    def _on_main(self, action: Callable[[], T]) -> T:
        return run_on_main(action, self._parallel)


def run_on_main(action: Callable[[], T], parallel: World) -> T:
    """What ``action`` returns on rank 0, or the RolloutError that it raises there, on every rank."""
    found = on_every_rank(lambda: action() if parallel.is_main else None, parallel)[0]
    return found  # type: ignore[return-value]
