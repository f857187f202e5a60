"""The rollout engine of the production path: SGLang servers over HTTP, with weights pushed into them.

Who does what: sglang_client.py speaks to one server, sglang_server.py knows its state, sglang_servers.py
which of all a request goes to; sglang_generation.py draws and retries; sglang_update.py brings weights in and
proves it (served_weights.py: leaves those that are there); server_sources.py says which servers there are;
transport.py carries the weights. This file ties
them together, and keeps the ranks together: rank 0 decides, the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING

import aiohttp

from apo_megatron.config.rollout import RolloutConfig
from apo_megatron.errors import RolloutError
from apo_megatron.parallel.collectives import all_reduce_max
from apo_megatron.parallel.world import World
from apo_megatron.rollout.engine import Probe, Progress, SampleRequest, SamplingParams
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.model_limits import ModelLimits
from apo_megatron.rollout.server_sources import ServerSource
from apo_megatron.rollout.sglang_client import SGLangClient, open_session
from apo_megatron.rollout.sglang_generation import ABORT_SECONDS, Decode, DrawSettings, SGLangGeneration
from apo_megatron.rollout.sglang_servers import ServerSet
from apo_megatron.rollout.sglang_update import UpdateOutcome, Updater, run_on_main
from apo_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from apo_megatron.weights.source import WeightSource

NOTE_SECONDS = 10.0  # between two status lines while there is nothing to do but wait
POLL_SECONDS = 0.5
# What rank 0 finds when the engine looks at its servers.
_NONE_SERVES, _SOME_SERVE, _SOME_BEHIND, _NO_HOPE = range(4)


class SGLangEngine:
    """Draws with SGLang servers. A ``RolloutEngine``.

    ``source`` is given on rank 0 only. ``note`` takes status lines, on rank 0.
    """

    def __init__(
        self,
        cfg: RolloutConfig,
        limits: ModelLimits,
        decode: Decode,
        parallel: World,
        loop: EventLoopThread,
        updater: Updater,
        source: ServerSource | None,
        api_key: str | None,
        note: Callable[[str], None],
    ) -> None:
        assert (source is not None) == parallel.is_main
        self.policy_version = -1
        self._cfg, self._limits, self._decode = cfg, limits, decode
        self._parallel, self._loop, self._updater = parallel, loop, updater
        self._source, self._note = source, note
        self._session = loop.run(open_session(api_key))
        self._servers = loop.run(_make_servers(cfg, limits, self._session, parallel.rank, source))
        self._probe: Probe | None = None
        self._generations: list[SGLangGeneration] = []
        self._is_asleep = False
        self._give_up_at = 0.0  # rank 0: monotonic seconds, the end of its patience in update_weights
        self._has_noted_unchanged = False
        self._failure: str | None = None  # rank 0: why there is no hope
        self._last_note = monotonic()

    @property
    def weights_label(self) -> str:
        """What the servers call the weights that they should have; "" before the first update."""
        return self._servers.label

    # Drawing: no collective

    def start(
        self, requests: Sequence[SampleRequest], sampling: SamplingParams, progress: Progress | None = None
    ) -> SGLangGeneration:
        """See ``RolloutEngine``. Raises RolloutError for what must not be sent: tokens that the model does
        not have, or more of them than it has positions."""
        if self.policy_version < 0 or self._is_asleep:
            raise RolloutError("the rollout engine has no weights: call update_weights before it draws")
        stop_token_ids = self._limits.stop_token_ids(sampling)
        self._limits.check([request.prompt for request in requests], sampling)
        settings = DrawSettings(
            sampling,
            stop_token_ids,
            self.policy_version,
            self._cfg.sglang.max_attempts,
            # A router takes one set of parameters for all samples, and one seed would make them equal.
            sends_seeds=self._cfg.sglang.router_url is None,
            decode=self._decode,
        )
        generation = SGLangGeneration(requests, settings, self._servers, self._loop, progress)
        self._generations = [*(g for g in self._generations if not g.has_ended()), generation]
        return generation

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See ``RolloutEngine``. Raises RolloutError as ``start`` and ``Generation.wait`` do."""
        requests = [SampleRequest(prompt, sampling.num_samples) for prompt in prompts]
        generation = self.start(requests, sampling, progress)
        while not generation.wait(POLL_SECONDS):
            self._servers.note_waiting()
            self._note_outage()
        return generation.results()

    # Weights: collective

    def update_weights(
        self, source: WeightSource, version: int, probe: Probe | None = None
    ) -> dict[str, float]:
        """See ``RolloutEngine``. Servers that do not take the weights are left out until ``recover``; where
        none takes them it is tried again until unavailable_timeout. The metrics are canary_gap (of the
        worst server), num_servers, and num_servers_unchanged: those with the checksum of before."""
        self.policy_version = -1
        self._stop_generations()
        if self._source is not None and self._is_asleep:
            self._source.hold_starts(False)
        self._give_up_at = monotonic() + self._cfg.sglang.unavailable_timeout
        label, outcome = "", UpdateOutcome({}, {})
        while not outcome.proofs:
            names: list[str] = []
            while not names:  # in slices: a collective must not outlast the time-out of its group
                names = self._agree(self._wait_for_servers)
            label = label or self._updater.new_label([self._servers[name] for name in names], version)
            outcome = self._push(names, source, label, probe)
            if not outcome.proofs:
                sleep(self._cfg.sglang.health_interval)
        self.policy_version, self._probe = version, probe
        metrics = {
            "num_servers": float(len(outcome.proofs)),
            "num_servers_unchanged": float(len(outcome.unchanged)),
        }
        self._note_unchanged(outcome.unchanged, version)
        if probe is not None:
            metrics["canary_gap"] = max(proof.canary_gap for proof in outcome.proofs.values())
        return metrics

    def recover(self, source: WeightSource | None) -> bool:
        """See ``RolloutEngine``. Raises RolloutError where no server is usable and none will come back."""
        assert self.policy_version >= 0 and not self._is_asleep, "recover comes after update_weights"
        self._servers.note_waiting()
        found = all_reduce_max(
            self._look_around(can_update=source is not None) if self._parallel.is_main else 0, self._parallel
        )
        if found == _NO_HOPE:
            run_on_main(self._raise_failure, self._parallel)
        if found != _SOME_BEHIND:
            return found == _SOME_SERVE
        assert source is not None
        names = self._agree(lambda: self._loop.run(self._servers.behind()))
        self._push(names, source, self._servers.label, self._probe)
        self._servers.note_waiting()
        return run_on_main(lambda: self._loop.run(self._servers.serves()), self._parallel)

    def sleep(self) -> None:
        """See ``RolloutEngine``. Servers with GPUs of their own stay as they are."""
        if not self._cfg.sglang.colocated:
            return
        self._stop_generations()
        names = self._agree(lambda: self._loop.run(self._servers.reachable()))
        self._loop.run(self._servers.stop_watching(names))
        if self._source is not None:
            self._source.hold_starts(True)
        problems = self._updater.put_to_sleep([self._servers[name] for name in names])
        if self._source is not None:  # what is not asleep has memory that the trainer needs
            asleep = set(names) - problems.keys()
            for name in self._loop.run(self._servers.addresses()).keys() - asleep:
                self._source.restart(name, "it did not free its memory for the trainer")
        self._loop.run(self._servers.set_updated("", [], problems))
        self._note_problems(problems)
        self._is_asleep = True

    def close(self) -> None:
        """End what runs, the connections, and the servers that this run has started."""
        self.policy_version = -1
        try:
            self._stop_generations()
            self._updater.close()
            self._loop.run(_close_connections(self._servers, self._session))
        finally:
            if self._source is not None:
                self._source.close()
            self._loop.close()

    def _push(
        self, names: Sequence[str], source: WeightSource, label: str, probe: Probe | None
    ) -> UpdateOutcome:
        """Collective: the weights into these servers, which are used from then on."""
        self._loop.run(self._servers.stop_watching(names))  # paused, they answer no health check
        outcome = self._updater.update([self._servers[name] for name in names], source, label, probe)
        self._loop.run(self._servers.set_updated(label, outcome.proofs, outcome.problems))
        self._loop.run(self._servers.watch())
        self._note_problems(outcome.problems)
        self._is_asleep = False
        return outcome

    def _agree(self, choose: Callable[[], list[str]]) -> list[str]:
        """The names of servers that rank 0 chooses; every rank then knows the same servers as that one."""
        names, addresses = run_on_main(
            lambda: (choose(), self._loop.run(self._servers.addresses())), self._parallel
        )
        self._loop.run(self._servers.replace(addresses))
        return names

    def _stop_generations(self) -> None:
        for generation in self._generations:
            generation.stop()
        for generation in self._generations:
            generation.wait_for_end(3 * ABORT_SECONDS)
        self._generations = []

    # Rank 0

    def _wait_for_servers(self) -> list[str]:
        """Servers to update, none after NOTE_SECONDS without any."""
        assert self._source is not None
        note_at = monotonic() + NOTE_SECONDS
        while monotonic() < note_at:
            self._loop.run(self._servers.replace(self._source.addresses()))
            if self._source.is_starting():
                self._give_up_at = monotonic() + self._cfg.sglang.unavailable_timeout
            elif monotonic() > self._give_up_at:
                raise RolloutError(
                    f"no SGLang server took the weights for {self._cfg.sglang.unavailable_timeout:g} s "
                    f"(sglang.unavailable_timeout): {self._servers.describe()}"
                )
            names = self._loop.run(self._servers.reachable())
            if names:
                return names
            failure = self._source.failure()
            if failure is not None:
                raise RolloutError(failure)
            sleep(POLL_SECONDS)
        if not self._source.is_starting():  # which has lines of its own
            self._note(f"waiting for SGLang servers: {self._servers.describe()}")
        return []

    def _look_around(self, can_update: bool) -> int:
        """What there is to do about the servers; the looks themselves happen in the background."""
        assert self._source is not None
        try:
            addresses = self._source.addresses()
            self._failure = self._source.failure()
        except RolloutError as error:
            self._failure = str(error)
            return _NO_HOPE
        self._loop.run(self._servers.replace(addresses))
        self._loop.run(self._servers.watch())
        serves = self._loop.run(self._servers.serves())
        if not serves and self._failure is not None:
            return _NO_HOPE
        self._note_outage()
        if can_update and self._loop.run(self._servers.behind()):
            return _SOME_BEHIND
        return _SOME_SERVE if serves else _NONE_SERVES

    def _raise_failure(self) -> None:
        raise RolloutError(str(self._failure))

    def _note_problems(self, problems: Mapping[str, str]) -> None:
        if self._parallel.is_main:
            for problem in problems.values():
                self._note(f"left out until it takes the weights: {problem}")

    def _note_unchanged(self, names: Sequence[str], version: int) -> None:
        if names and self._parallel.is_main and not self._has_noted_unchanged:
            self._has_noted_unchanged = True
            self._note(
                f"after the update to version {version} the weights of {', '.join(names)} have the same "
                "checksum as before: it changed nothing (a skipped update, a learning rate near 0), or did "
                "not arrive (said once: see num_servers_unchanged)"
            )

    def _note_outage(self) -> None:
        seconds = self._servers.seconds_without_servers()
        if self._parallel.is_main and min(seconds, monotonic() - self._last_note) > NOTE_SECONDS:
            self._last_note = monotonic()
            self._note(f"no SGLang server is usable for {seconds:.0f} s: {self._servers.describe()}")


async def _make_servers(
    cfg: RolloutConfig,
    limits: ModelLimits,
    session: aiohttp.ClientSession,
    rank: int,
    source: ServerSource | None,
) -> ServerSet:
    def make_client(name: str, url: str) -> SGLangClient:
        return SGLangClient(
            name,
            url,
            session,
            limits.vocab_size,
            request_timeout=cfg.sglang.request_timeout,
            update_timeout=cfg.sglang.update_timeout,
            control_timeout=cfg.sglang.health_timeout,
        )

    # Ranks begin with different servers: each knows only of its own requests.
    on_hang = None if source is None else source.restart
    return ServerSet(cfg.sglang, make_client, first=rank, on_hang=on_hang)


async def _close_connections(servers: ServerSet, session: aiohttp.ClientSession) -> None:
    await servers.close()
    await session.close()
