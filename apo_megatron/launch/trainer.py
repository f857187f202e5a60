"""The ranks of one attempt: started together, watched together, ended together."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apo_megatron.errors import ConfigError
from apo_megatron.files import write_atomically
from apo_megatron.launch.cluster import Actor, ActorLost, Call, Cluster
from apo_megatron.launch.outcome import LogTail, RankEnd
from apo_megatron.launch.placement import (
    Node,
    Plan,
    RankPlace,
    common_address,
    place_ranks,
    rank_environment,
    visible_devices,
)
from apo_megatron.launch.rank_process import RankProcess
from apo_megatron.launch.waiting import Waiting

# Ray itself takes a minute to notice a machine that hangs or is cut off.
SECONDS_BETWEEN_PINGS = 5.0
SECONDS_WITHOUT_ANSWER = 25.0
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL, once a rank has failed
_ANSWER_SECONDS = 5.0


@dataclass
class _Rank:
    place: RankPlace
    actor: Actor
    run: Call | None = None
    ping: Call | None = None
    pinged: float = 0.0
    end: RankEnd | None = None


class Trainer:
    """One actor for each rank. ``close`` ends everything."""

    def __init__(
        self, cluster: Cluster, plan: Plan, nodes: Sequence[Node], folder: str | None, log_folder: Path
    ) -> None:
        """``nodes``: of each bundle; ``folder``: where ranks run, None = where their actors do."""
        self._cluster, self._log_folder = cluster, log_folder
        num_gpus = 1 if plan.use_gpu else 0
        self._ranks = [
            _Rank(place, cluster.start_actor(RankProcess, place.bundle, num_gpus, folder))
            for place in place_ranks(plan, nodes)
        ]
        self._shown = LogTail(self.log_path(0))
        self.ends: list[RankEnd] = []  # as they are seen
        self.devices: dict[str, str] = {}  # by node, the GPUs of its ranks
        self._first_failure: float | None = None  # when
        self._port = ""  # of the store in which the ranks meet

    @property
    def places(self) -> list[RankPlace]:
        return [rank.place for rank in self._ranks]

    @property
    def is_running(self) -> bool:
        return len(self.ends) < len(self._ranks)

    def has_failed_for(self, seconds: float) -> bool:
        """Whether the first failure was seen so long ago."""
        return self._first_failure is not None and time.monotonic() - self._first_failure >= seconds

    def log_path(self, rank: int) -> Path:
        return self._log_folder / f"rank_{rank}.log"

    def prepare(self, waiting: Waiting) -> None:
        """Wait for the actors and let each look at its node; a rank that is lost meanwhile is in ``ends``.

        Raises ConfigError for a node where ranks cannot run, and what ``waiting`` does.
        """
        probe, content = self._log_folder / "shared_folder", secrets.token_hex(8)
        write_atomically(probe, content)
        answers = self._ask_all("problem", waiting, str(probe), content)
        for rank, problem in zip(self._ranks, answers, strict=True):
            if problem:
                raise ConfigError(f"node {rank.place.node.label} {problem}")
        self.devices = visible_devices(self.places, self._ask_all("devices", waiting))
        (self._port,) = self._ask_all("host_store", waiting, ranks=self._ranks[:1])

    def start(self, config_text: str, environment: Mapping[str, str]) -> None:
        """Start the trainer with this configuration (YAML) in every rank."""
        places = self.places
        address = common_address([place.node for place in places])
        for rank in self._ranks:
            variables = {**environment, **rank_environment(rank.place, len(places), address, self._port)}
            devices = self.devices[rank.place.node.node_id]
            log = str(self.log_path(rank.place.rank))
            rank.run = rank.actor.call("run", variables, devices, config_text, log)

    def poll(self, seconds: float) -> None:
        """Show what rank 0 says, see who has ended; at most so long."""
        running = [rank for rank in self._ranks if rank.end is None]
        self._cluster.wait([rank.run for rank in running if rank.run is not None], seconds)
        self.show_output()
        for rank in running:
            assert rank.run is not None, "start comes first"
            if rank.run.is_done():
                try:
                    self._note_end(rank, rank.run.result(_ANSWER_SECONDS))
                except ActorLost:
                    self._note_end(rank, None, "was lost: its process, or that of its actor, was killed")
            else:
                self._ping(rank)

    def ask_to_stop(self) -> None:
        """SIGTERM to every rank: the run saves its state and ends."""
        for rank in self._ranks:
            if rank.end is None:
                rank.actor.call("ask_to_stop")

    def show_output(self, to_end: bool = False) -> None:
        """What rank 0 has printed, as it is."""
        text = self._shown.new_text(to_end)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def close(self, grace: float = GRACE_SECONDS) -> None:
        """End what runs, by SIGTERM and then SIGKILL, and the actors. All processes are gone then, but for
        those on a node that does not answer."""
        running = [rank for rank in self._ranks if rank.end is None]
        calls = [rank.actor.call("end", grace) for rank in running]
        deadline = time.monotonic() + grace + _ANSWER_SECONDS
        calls += [rank.run for rank in running if rank.run is not None]
        while not all(call.is_done() for call in calls) and time.monotonic() < deadline:
            self._cluster.wait([call for call in calls if not call.is_done()], 0.5)
        for rank in self._ranks:
            rank.actor.kill()
        self.show_output(to_end=True)

    def _ask_all(
        self, method: str, waiting: Waiting, *values: object, ranks: Sequence[_Rank] | None = None
    ) -> list[str]:
        """What each rank's actor answers; "" for one that is lost."""
        ranks = self._ranks if ranks is None else ranks
        calls = [rank.actor.call(method, *values) for rank in ranks]
        while missing := [rank for rank, call in zip(ranks, calls, strict=True) if not call.is_done()]:
            nodes = ", ".join(sorted({rank.place.node.label for rank in missing}))
            waiting.step([f"for {len(missing)} of {len(self._ranks)} rank processes on {nodes}"])
            self._cluster.wait([call for call in calls if not call.is_done()], 0.2)
        answers = []
        for rank, call in zip(ranks, calls, strict=True):
            try:
                answers.append(call.result(_ANSWER_SECONDS))
            except ActorLost as loss:
                answers.append("")
                self._note_end(rank, None, f"was lost before it started: {loss}")
        return answers

    def _ping(self, rank: _Rank) -> None:
        now = time.monotonic()
        if rank.ping is None or rank.ping.is_done():  # a lost actor shows in its run
            if now - rank.pinged > SECONDS_BETWEEN_PINGS:
                rank.ping, rank.pinged = rank.actor.call("ping"), now
        elif now - rank.pinged > SECONDS_WITHOUT_ANSWER:
            problem = f"has not answered for {now - rank.pinged:.0f} s: its node hangs or is cut off"
            self._note_end(rank, None, problem, node_is_silent=True)

    def _note_end(
        self, rank: _Rank, code: int | None, problem: str = "", node_is_silent: bool = False
    ) -> None:
        if rank.end is not None:
            return
        rank.end = RankEnd(rank.place, code, problem, node_is_silent)
        self.ends.append(rank.end)
        if rank.end.is_failure and self._first_failure is None:
            self._first_failure = time.monotonic()
