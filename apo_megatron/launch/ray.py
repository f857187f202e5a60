"""Runs the trainer on a Ray cluster.

    python -m apo_megatron.launch.ray --config run.yaml [--num-trainers N] [section.field=value ...]

Configuration, overrides and exit codes are those of ``apo_megatron.train``. Ray places processes and tells
when one is gone (this file is the only one that imports it); what follows from that is in supervisor.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node  # there is no public one
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from apo_megatron.config import RLConfig
from apo_megatron.errors import ConfigError
from apo_megatron.launch.cluster import ActorLost, Call
from apo_megatron.launch.command import LaunchOptions, read_command_line
from apo_megatron.launch.outcome import RunFailed
from apo_megatron.launch.placement import Node, Resources, describe, make_plan
from apo_megatron.launch.stop_signals import StopSignals
from apo_megatron.launch.supervisor import Supervisor
from apo_megatron.telemetry.command import run_command

LOCAL = "local"
OBJECT_STORE_BYTES = 100 * 2**20  # of a local cluster: nothing large goes through it
CALLS_AT_ONCE = 8  # of one actor
_CONNECT_SECONDS = 10.0


class RayCall:
    """A method of an actor that was called."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def is_done(self) -> bool:
        done, _ = ray.wait([self.reference], timeout=0)
        return bool(done)

    def result(self, timeout: float) -> Any:
        try:
            return ray.get(self.reference, timeout=timeout)
        except GetTimeoutError as error:
            raise TimeoutError(f"no answer within {timeout:g} s") from error
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            raise ActorLost(str(error)) from None


class RayActor:
    """A process in a bundle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *values: Any) -> RayCall:
        return RayCall(getattr(self._handle, method).remote(*values))

    def kill(self) -> None:
        ray.kill(self._handle)


class RayCluster:
    """The cluster that ``ray.init`` has connected to, with one placement group."""

    def __init__(self) -> None:
        self._group: PlacementGroup | None = None

    def nodes(self) -> list[Node]:
        free = available_resources_per_node()
        return [
            Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], free.get(n["NodeID"], {}))
            for n in ray.nodes()
            if n["Alive"]
        ]

    def reserve(self, bundles: Sequence[Resources]) -> None:
        self._group = placement_group(list(bundles), strategy="PACK")

    def bundle_nodes(self) -> list[Node | None]:
        alive = {node.node_id: node for node in self.nodes()}
        found = placement_group_table(self._group)["bundles_to_node_id"]
        return [alive.get(found[bundle]) for bundle in sorted(found)]

    def start_actor(self, body: type, bundle: int, num_gpus: int, *values: Any) -> RayActor:
        assert self._group is not None, "reserve comes first"
        actor_class: Any = ray.remote(body)
        placed = actor_class.options(
            num_cpus=1,
            num_gpus=num_gpus,
            max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            ),
        )
        return RayActor(placed.remote(*values))

    def wait(self, calls: Sequence[Call], seconds: float) -> None:
        references = [call.reference for call in calls if isinstance(call, RayCall)]
        ray.wait(references, timeout=seconds)

    def close(self) -> None:
        try:
            if self._group is not None:
                remove_placement_group(self._group)
        except RayError:
            pass  # the cluster is gone, and the reservation with it
        finally:
            ray.shutdown()


def connect(address: str | None, num_cpus: int) -> str:
    """Connect to a cluster, or start one on this machine with at least ``num_cpus``; which of the two.

    ``address`` None: RAY_ADDRESS, else the cluster that runs on this machine, else a new one. Raises
    ConfigError where nothing answers at an address.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    named = address or os.environ.get("RAY_ADDRESS")
    if named and named.startswith("ray://"):
        raise ConfigError(
            f"{named} is an address of Ray Client, which ends what it has started when a connection breaks: "
            "name the HOST:PORT of the cluster's head, or send the launcher there with ray job submit"
        )
    found = named or _running_here()
    if found is not None and found != LOCAL:
        if _answers(found):
            ray.init(address=found, **quiet)
            return f"connected to the cluster at {found}"
        if named:
            raise ConfigError(
                f"no Ray cluster answers at {found}: start one (ray start --head), name the HOST:PORT of its "
                "head (--address, RAY_ADDRESS), or give --address local to start one on this machine"
            )
    ray.init(
        address=LOCAL,
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **quiet,
    )
    return "started a cluster on this machine" + ("" if found == LOCAL else " (none was named or found)")


def _running_here() -> str | None:
    """The address that `ray start` has left on this machine."""
    try:
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None


def _answers(address: str) -> bool:
    """Whether somebody listens there: Ray itself would wait for minutes."""
    if address == "auto":
        return True
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def say(text: str) -> None:
    """A line of the launcher among those of the run."""
    print("\n".join(f"ray: {line}" for line in text.splitlines()), flush=True)


def launch(options: LaunchOptions, cfg: RLConfig, words: Sequence[str]) -> None:
    """The whole run. Raises RunFailed, RunInterrupted and the errors of ``errors.py``."""
    num_cpus = sum(bundle["CPU"] for bundle in make_plan(cfg, options.num_trainers, ()).bundles())
    which = connect(options.address, int(num_cpus))
    cluster = RayCluster()
    try:
        with StopSignals() as stop:
            nodes = cluster.nodes()
            totals = {name: sum(node.total.get(name, 0) for node in nodes) for name in ("GPU", "CPU")}
            say(f"{which}: {len(nodes)} node{'s' * (len(nodes) > 1)}, {describe(totals)}")
            plan = make_plan(cfg, options.num_trainers, nodes)
            servers = f", SGLang servers: {plan.num_servers}" if plan.num_servers else ""
            say(f"trainer ranks: {plan.num_ranks}{servers}, on {'GPUs' if plan.use_gpu else 'CPUs'}")
            Supervisor(cluster, plan, cfg, options, words, _folder_of_ranks(cfg), stop, say).run()
    finally:
        cluster.close()


def _folder_of_ranks(cfg: RLConfig) -> str | None:
    """Where ranks run: here, or where the job's working_dir is unpacked on their node (None)."""
    if not ray.get_runtime_context().runtime_env.get("working_dir"):
        return os.getcwd()
    if not Path(cfg.train.run_dir).is_absolute():
        raise ConfigError(
            f"train.run_dir={cfg.train.run_dir} is relative to the job's working_dir, a temporary copy on "
            "each node: name an absolute path on a file system that all nodes share"
        )
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line (default: that of the process); the exit code."""

    def run(words: Sequence[str]) -> None:
        options, cfg = read_command_line(words)
        try:
            launch(options, cfg, words)
        except RunFailed as failure:
            print(f"error: {failure}", file=sys.stderr)
            raise SystemExit(failure.exit_code) from failure

    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
