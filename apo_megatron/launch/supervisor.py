"""Keeps a run going on a cluster: places it, starts servers and ranks, restarts or ends what fails."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from apo_megatron.actor.checkpoint_files import CheckpointFolder
from apo_megatron.config import RLConfig
from apo_megatron.errors import CheckpointError, ConfigError, RunInterrupted
from apo_megatron.launch.cluster import Cluster
from apo_megatron.launch.command import LaunchOptions, command_to_go_on
from apo_megatron.launch.outcome import RankEnd, RunFailed, first_failure, last_lines
from apo_megatron.launch.placement import Node, Plan, describe_wait, why_never
from apo_megatron.launch.rank_process import RankProcess
from apo_megatron.launch.servers import SERVERS_FILE, Servers
from apo_megatron.launch.stop_signals import StopSignals
from apo_megatron.launch.trainer import Trainer
from apo_megatron.launch.waiting import Waiting
from apo_megatron.telemetry.command import EXIT_INTERRUPTED, EXIT_USER_ERROR

POLL_SECONDS = 0.5
VERDICT_SECONDS = 20.0  # Ray takes 13, as measured, to give up a node whose processes were killed
SETTLE_SECONDS = 4.0  # after a failure: others fail because of it, and may be seen first
# Variables of the launcher that processes on other nodes get, too. torchrun hands on all of them, but what
# describes this machine (PATH, LD_LIBRARY_PATH, ...) need not hold for another one.
HANDED_ON = ("APO_MEGATRON_", "GLOO_", "HF_", "NCCL_", "OMP_NUM_THREADS", "SGLANG_", "TORCH_", "WANDB_")


class Supervisor:
    """One run, over all its attempts."""

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        cfg: RLConfig,
        options: LaunchOptions,
        words: Sequence[str],
        folder: str | None,
        stop: StopSignals,
        say: Callable[[str], None],
    ) -> None:
        """``words``: the command line; ``folder``: where ranks run, None = where their actors do."""
        self._cluster, self._plan, self._cfg, self._options = cluster, plan, cfg, options
        self._words, self._folder, self._stop, self._say = words, folder, stop, say
        self._run_dir = Path(cfg.train.run_dir).absolute()
        self._log_folder = self._run_dir / "logs"
        self._environment = self._handed_on()
        max_restarts = cfg.rollout.sglang.max_restarts
        self._servers = Servers(cluster, plan, self._config_text(), self._run_dir, folder, max_restarts, say)

    def run(self) -> None:
        """To the end of the run. Raises RunFailed, RunInterrupted, and the errors of servers and nodes."""
        self._log_folder.mkdir(parents=True, exist_ok=True)
        self._cluster.reserve(self._plan.bundles())
        try:
            for num_failures in itertools.count():
                failure = self._attempt(resume=num_failures > 0)
                if failure is None:
                    return
                self._say(failure.describe())
                if num_failures == self._options.max_failures or failure.code == EXIT_USER_ERROR:
                    raise RunFailed(self._describe(failure), failure.exit_code)
                count = f"restart {num_failures + 1} of {self._options.max_failures}"
                self._say(f"all ranks were ended; {count}, from {self._latest() or 'the beginning'}")
        finally:
            self._servers.close()

    def _attempt(self, resume: bool) -> RankEnd | None:
        """Run the trainer once; the failure that ended it. Raises RunInterrupted."""
        trainer = self._place_trainer(resume)
        try:
            if not trainer.ends:
                self._servers.attend(trainer.places, trainer.devices, self._environment)
                trainer.start(self._config_text(resume), self._environment)
                self._watch(trainer)
        finally:
            trainer.close()
        failure = first_failure(trainer.ends)
        codes = {end.code for end in trainer.ends}
        if self._stop.count and -signal.SIGTERM in codes:
            raise RunInterrupted(f"{self._stop.name} received before the first step. {self._how_to_go_on()}")
        if failure is None and EXIT_INTERRUPTED in codes:
            raise RunInterrupted(f"the run was stopped. {self._how_to_go_on()}")
        if failure is not None and failure.code is None and self._is_node_gone(failure):
            return replace(failure, problem="was lost: its node is gone")
        return failure

    def _place_trainer(self, resume: bool) -> Trainer:
        """Actors for all ranks, ready; some have ended where they cannot run. Ray may place some on a node
        that is gone, which it notices seconds later: then they are placed again."""
        waiting = Waiting(self._stop, self._say, self._options.wait_minutes)
        while True:
            nodes = self._wait_for_nodes(waiting, may_come_back=resume)
            trainer = Trainer(self._cluster, self._plan, nodes, self._folder, self._log_folder)
            try:
                trainer.prepare(waiting)
            except BaseException:  # a signal, the end of patience, a node where ranks cannot run
                trainer.close()
                raise
            if not any(self._is_node_gone(end) for end in trainer.ends):
                return trainer
            trainer.close()

    def _is_node_gone(self, failure: RankEnd) -> bool:
        """Whether Ray gives up the node of a lost rank. A node that can start a process is not gone; one
        that is silent is not waited for: a failed run ends within a minute."""
        place = failure.place
        probe = self._cluster.start_actor(RankProcess, place.bundle, 0, None)
        answer = probe.call("ping")
        until = time.monotonic() + (0.0 if failure.node_is_silent else VERDICT_SECONDS)
        while place.node.node_id in self._alive() and not answer.is_done() and time.monotonic() < until:
            self._cluster.wait([answer], POLL_SECONDS)
        probe.kill()
        return place.node.node_id not in self._alive()

    def _alive(self) -> set[str]:
        return {node.node_id for node in self._cluster.nodes()}

    def _wait_for_nodes(self, waiting: Waiting, may_come_back: bool) -> list[Node]:
        """The node of each of the trainer's bundles. Raises ConfigError where the cluster is too small."""
        bundles = self._plan.bundles()
        while True:
            placed = self._cluster.bundle_nodes()[: self._plan.num_trainer_bundles]
            found = [node for node in placed if node is not None]
            if len(found) == len(placed):
                return found
            nodes = self._cluster.nodes()
            demand, *lines = describe_wait(bundles, nodes)
            never = why_never(bundles, nodes)
            if never is not None and not (may_come_back or self._options.wait_for_nodes):
                there = "\n".join([demand, *lines])
                raise ConfigError(
                    f"the cluster is too small for this run, it lacks {never}: start fewer trainer ranks "
                    f"(--num-trainers) or servers, or more nodes (--wait-for-nodes waits for them). {there}"
                )
            lack = "" if never is None else f" The cluster lacks {never}."
            waiting.step([f"for resources, {demand}.{lack}", *lines])
            time.sleep(POLL_SECONDS)

    def _watch(self, trainer: Trainer) -> None:
        """Until every rank has ended, or one has failed. Raises RunInterrupted after a second signal."""
        num_signals = 0
        while trainer.is_running and not trainer.has_failed_for(SETTLE_SECONDS):
            trainer.poll(POLL_SECONDS)
            self._servers.poll()
            if self._stop.count == num_signals:
                continue
            num_signals = self._stop.count
            if num_signals > 1:
                raise RunInterrupted(f"{self._stop.name} received again: killed. {self._how_to_go_on()}")
            self._say(f"{self._stop.name} received: the run saves its state and ends (once more kills it)")
            trainer.ask_to_stop()

    def _config_text(self, resume: bool = False) -> str:
        """The resolved configuration as YAML: all that the processes on the nodes are told of the run."""
        values: dict[str, Any] = self._cfg.model_dump(mode="json")
        if self._plan.num_servers:
            values["rollout"]["sglang"]["servers_file"] = str(self._run_dir / SERVERS_FILE)
        if resume:
            values["checkpoint"]["resume"] = "auto"
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def _handed_on(self) -> dict[str, str]:
        """Variables for ranks and servers; one OpenMP thread unless told otherwise, as under torchrun."""
        key = self._cfg.rollout.sglang.api_key_variable
        found = {name: text for name, text in os.environ.items() if name.startswith(HANDED_ON) or name == key}
        return {"OMP_NUM_THREADS": "1", **found}

    def _describe(self, failure: RankEnd) -> str:
        """What a user needs after a failure: who, its last words, how to go on."""
        lines = [f"{failure.describe()}. All other ranks were ended."]
        if failure.place.rank != 0:  # what rank 0 said was shown
            log = self._log_folder / f"rank_{failure.place.rank}.log"
            lines += [f"Its last lines ({log}):", *(f"  {line}" for line in last_lines(log))]
        return "\n".join([*lines, self._how_to_go_on()])

    def _how_to_go_on(self) -> str:
        latest = self._latest()
        if latest is None:
            return "There is no checkpoint to go on from (checkpoint.interval)."
        return f"To go on from {latest}: {command_to_go_on(self._words)}"

    def _latest(self) -> str | None:
        try:
            latest = CheckpointFolder(self._run_dir / "checkpoints").latest()
        except CheckpointError:  # the next run names what is wrong there
            return None
        return None if latest is None else latest.name
