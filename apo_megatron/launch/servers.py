"""The SGLang servers of a run: one actor each, started again wherever there is room; the list of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.errors import ConfigError, RolloutError
from apo_megatron.files import write_atomically
from apo_megatron.launch.cluster import Actor, ActorLost, Call, Cluster
from apo_megatron.launch.placement import Node, Plan, RankPlace, common_address
from apo_megatron.launch.server_host import ServerHost

SERVERS_FILE = "servers.json"  # in the run directory
SECONDS_BETWEEN_LOOKS = 1.0
_ANSWER_SECONDS = 5.0
_CLOSE_SECONDS = 15.0


@dataclass
class _Server:
    """Its actor is there from ``_begin`` until ``_lose``."""

    name: str
    index: int
    actor: Actor | None = None
    node: Node | None = None
    start: Call | None = None  # until it serves
    look: Call | None = None
    url: str | None = None
    num_restarts: int = 0
    has_served: bool = False
    failure: str | None = None  # it is not started again


class Servers:
    """Call ``poll`` often: it starts, watches and restarts, and keeps the file of addresses up to date."""

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        config_text: str,
        run_dir: Path,
        folder: str | None,
        max_restarts: int,
        say: Callable[[str], None],
    ) -> None:
        self._cluster, self._plan, self._config_text = cluster, plan, config_text
        self._log_folder, self._file = run_dir / "servers", run_dir / SERVERS_FILE
        self._folder, self._max_restarts, self._say = folder, max_restarts, say
        self._servers = [_Server(f"server-{index}", index) for index in range(plan.num_servers)]
        self._places: Sequence[RankPlace] = ()
        self._devices: Mapping[str, str] = {}
        self._environment: Mapping[str, str] = {}
        self._listed: list[dict[str, str]] | None = None
        self._next_look = 0.0

    def attend(
        self, places: Sequence[RankPlace], devices: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        """The trainer runs at ``places``, with these GPUs by node: what is missing is started beside it."""
        self._places, self._devices, self._environment = places, devices, environment
        self.poll()

    def poll(self) -> None:
        """Takes no time. Raises RolloutError when no server is left, or what a first start has raised."""
        now = time.monotonic()
        if not self._servers or now < self._next_look:
            return
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        if any(server.actor is None and server.failure is None for server in self._servers):
            self._begin_missing()
        for server in self._servers:
            if server.actor is not None:
                try:
                    self._look(server, server.actor)
                except ActorLost:
                    self._lose(
                        server, "its process or its node is gone", counts=not self._was_misplaced(server)
                    )
        self._publish()
        failures = [server.failure for server in self._servers if server.failure is not None]
        if len(failures) == len(self._servers):
            raise RolloutError(f"no SGLang server is left. {failures[-1]}")

    def close(self) -> None:
        """End all servers."""
        actors = [server.actor for server in self._servers if server.actor is not None]
        calls = [actor.call("close") for actor in actors]
        deadline = time.monotonic() + _CLOSE_SECONDS
        while (open_calls := [call for call in calls if not call.is_done()]) and time.monotonic() < deadline:
            self._cluster.wait(open_calls, 0.5)
        for actor in actors:
            actor.kill()
        for server in self._servers:
            server.actor = server.url = None
        if self._servers:
            self._publish()

    def _begin_missing(self) -> None:
        """Start the servers without an actor whose bundle lies on a node that lives."""
        nodes = self._cluster.bundle_nodes()
        for server in self._servers:
            node = nodes[self._plan.server_bundle(server.index)]
            if server.actor is not None or server.failure is not None or node is None:
                continue
            if not self._plan.colocated or self._first_local_rank(server, node) is not None:
                self._begin(server, node)

    def _begin(self, server: _Server, node: Node) -> None:
        address = common_address([node, *(place.node for place in self._places)])
        environment = {**self._environment, **self._own_devices(server, node)}
        server.node = node
        server.actor = self._cluster.start_actor(
            ServerHost,
            self._plan.server_bundle(server.index),
            0 if self._plan.colocated or not self._plan.use_gpu else self._plan.gpus_per_server,
            server.name,
            self._config_text,
            address,
            self._folder,
            str(self._log_folder / server.name),
            environment,
            not self._plan.use_gpu,
        )
        server.start = server.actor.call("start")
        self._say(f"{server.name} starts on node {node.label}")

    def _own_devices(self, server: _Server, node: Node) -> dict[str, str]:
        """Colocated: GPUs of the ranks whose bundle it shares. Ray sets those of a server with its own."""
        if not (self._plan.colocated and self._plan.use_gpu):
            return {}
        first = self._first_local_rank(server, node)
        assert first is not None
        first += server.index * self._plan.gpus_per_server % self._plan.ranks_per_bundle
        own = self._devices[node.node_id].split(",")[first : first + self._plan.gpus_per_server]
        return {"CUDA_VISIBLE_DEVICES": ",".join(own)}

    def _first_local_rank(self, server: _Server, node: Node) -> int | None:
        """Of the ranks that share a bundle with a colocated server; None while they run elsewhere: after a
        node was lost the server starts again together with them."""
        bundle = self._plan.server_bundle(server.index)
        mates = [place for place in self._places if place.bundle == bundle]
        return mates[0].local_rank if mates and mates[0].node.node_id == node.node_id else None

    def _look(self, server: _Server, actor: Actor) -> None:
        """Raises ActorLost."""
        if server.start is not None and server.start.is_done():
            try:
                server.start.result(_ANSWER_SECONDS)
            except (RolloutError, ConfigError) as error:
                if not server.has_served and server.num_restarts == 0:
                    raise
                self._lose(server, str(error))
                return
            server.start = None
        if server.look is None:
            server.look = actor.call("state")
        elif server.look.is_done():
            call, server.look = server.look, None
            state = call.result(_ANSWER_SECONDS)
            for note in state.notes:
                self._say(note)
            server.url = state.url
            server.has_served = server.has_served or state.url is not None
            if state.failure is not None and server.start is None:
                self._give_up(server, state.failure)

    def _was_misplaced(self, server: _Server) -> bool:
        """Whether it was started on a node that was gone already, which Ray notices seconds later."""
        alive = {node.node_id for node in self._cluster.nodes()}
        return server.start is not None and server.node is not None and server.node.node_id not in alive

    def _lose(self, server: _Server, reason: str, counts: bool = True) -> None:
        """Its actor is of no use any more: the next look starts another one, unless that was the last."""
        if server.actor is not None:
            server.actor.kill()
        server.actor = server.start = server.look = server.url = None
        where = f" on node {server.node.label}" if server.node is not None else ""
        if not counts:
            return
        if server.num_restarts == self._max_restarts:
            limit = f"{self._max_restarts} restarts (rollout.sglang.max_restarts)"
            self._give_up(server, f"{server.name}{where} was lost after {limit}: {reason}")
            return
        server.num_restarts += 1
        count = f"restart {server.num_restarts} of {self._max_restarts}"
        self._say(f"{server.name}{where} was lost: {reason}. {count} when there is room for it")

    def _give_up(self, server: _Server, failure: str) -> None:
        if server.actor is not None:
            server.actor.kill()
        server.actor = server.start = server.look = server.url = None
        server.failure = failure
        self._say(failure)

    def _publish(self) -> None:
        """Write the file where it has changed; a reader never sees half of it."""
        entries = [{"name": server.name, "url": server.url} for server in self._servers if server.url]
        if entries != self._listed:
            write_atomically(self._file, json.dumps(entries, indent=1) + "\n")
            self._listed = entries
