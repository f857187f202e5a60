"""Which process goes where: bundles of resources, ranks by node, what a cluster is short of. Without Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apo_megatron.config.schema import RLConfig
from apo_megatron.errors import ConfigError

Resources = dict[str, float]  # as Ray counts them: {"GPU": 2.0, "CPU": 2.0}
COUNTED = ("GPU", "CPU")
LOOPBACK = "127.0.0.1"
NODES_SHOWN = 16  # in a status; larger clusters are summed up


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive."""

    node_id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    @property
    def label(self) -> str:
        """For messages; simulated nodes share an address."""
        return f"{self.address} ({self.node_id[:6]})"


@dataclass(frozen=True)
class Plan:
    """What the run asks of the cluster. Ray keeps a bundle on one node, whichever that is.

    The trainer's bundles come first, each with the ranks of a tensor-parallel group (or of several colocated
    servers), then a bundle for each server that has GPUs of its own.
    """

    num_ranks: int
    ranks_per_bundle: int
    num_servers: int
    gpus_per_server: int
    colocated: bool
    use_gpu: bool

    @property
    def num_trainer_bundles(self) -> int:
        return self.num_ranks // self.ranks_per_bundle

    def bundles(self) -> list[Resources]:
        """One CPU for each process beside its GPUs."""
        servers_in = Counter(self.server_bundle(i) for i in range(self.num_servers))
        trainer = [
            self._resources(self.ranks_per_bundle, self.ranks_per_bundle + servers_in[bundle])
            for bundle in range(self.num_trainer_bundles)
        ]
        num_apart = 0 if self.colocated else self.num_servers
        return trainer + [self._resources(self.gpus_per_server, 1) for _ in range(num_apart)]

    def server_bundle(self, server: int) -> int:
        """The bundle that server number ``server`` runs in."""
        if self.colocated:
            return server * self.gpus_per_server // self.ranks_per_bundle
        return self.num_trainer_bundles + server

    def _resources(self, num_gpus: int, num_cpus: int) -> Resources:
        return {**({"GPU": float(num_gpus)} if self.use_gpu else {}), "CPU": float(num_cpus)}


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs."""

    rank: int
    local_rank: int
    local_world_size: int
    bundle: int
    node: Node


def make_plan(cfg: RLConfig, num_ranks: int | None, nodes: Sequence[Node]) -> Plan:
    """The plan for ``num_ranks`` trainer ranks on GPUs where the cluster has some, else on CPUs.

    None: every GPU that the servers leave; without GPUs one copy of the model. No nodes: the cluster is not
    known yet. Raises ConfigError where the layout does not divide the ranks, or servers do not fit beside
    them.
    """
    parallel, sglang = cfg.parallel, cfg.rollout.sglang
    starts_servers = cfg.rollout.engine == "sglang" and not sglang.urls and sglang.servers_file is None
    num_servers = sglang.num_servers if starts_servers else 0
    colocated = starts_servers and sglang.colocated
    tensor, per_server = parallel.tensor_parallel_size, sglang.tensor_parallel_size
    per_bundle = math.lcm(tensor, per_server) if colocated else tensor
    model = tensor * parallel.pipeline_parallel_size * parallel.context_parallel_size
    step = math.lcm(model, per_bundle)
    num_gpus = int(sum(node.total.get("GPU", 0) for node in nodes))
    is_guess = num_ranks is None and not nodes
    if num_ranks is None:
        left = num_gpus - (0 if colocated else num_servers * per_server)
        num_ranks = max(step, left // step * step) if num_gpus else step
    if num_ranks % step:
        raise ConfigError(
            f"--num-trainers={num_ranks} must be a multiple of {step}: parallel.tensor_parallel_size="
            f"{tensor} x pipeline_parallel_size={parallel.pipeline_parallel_size} x context_parallel_size="
            f"{parallel.context_parallel_size}"
            + (f", with servers of {per_server} GPUs" if colocated else "")
        )
    if colocated and num_servers * per_server > num_ranks and not is_guess:
        raise ConfigError(
            f"rollout.sglang: num_servers={num_servers} x tensor_parallel_size={per_server} is more than the "
            f"{num_ranks} GPUs of the trainer that colocated=true shares: start fewer servers"
        )
    return Plan(num_ranks, per_bundle, num_servers, per_server, colocated, use_gpu=num_gpus > 0)


def place_ranks(plan: Plan, nodes: Sequence[Node]) -> list[RankPlace]:
    """The ranks in order, given the node of each bundle: ranks of a node are adjacent."""
    order = sorted(
        range(plan.num_trainer_bundles), key=lambda bundle: (nodes[bundle].address, nodes[bundle].node_id)
    )
    bundles = [bundle for bundle in order for _ in range(plan.ranks_per_bundle)]
    local_sizes = Counter(nodes[bundle].node_id for bundle in bundles)
    seen: Counter[str] = Counter()
    places = []
    for rank, bundle in enumerate(bundles):
        node = nodes[bundle]
        places.append(RankPlace(rank, seen[node.node_id], local_sizes[node.node_id], bundle, node))
        seen[node.node_id] += 1
    return places


def common_address(nodes: Sequence[Node]) -> str:
    """The address under which all of ``nodes`` reach the first one: loopback where they are one machine."""
    return LOOPBACK if len({node.address for node in nodes}) == 1 else nodes[0].address


def rank_environment(place: RankPlace, num_ranks: int, master_address: str, port: str) -> dict[str, str]:
    """What torchrun sets for a rank, too. The store at ``port`` is there already: every rank is a client."""
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": master_address,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def visible_devices(places: Sequence[RankPlace], devices: Sequence[str]) -> dict[str, str]:
    """By node, the GPUs of all ranks there, ``0,1,2``, given those of each rank; "" without GPUs.

    All ranks of a node see them all, as under torchrun: LOCAL_RANK counts among them, and memory can be
    shared between them.
    """
    by_node: dict[str, list[str]] = {}
    for place, own in zip(places, devices, strict=True):
        by_node.setdefault(place.node.node_id, []).extend(own.split(",") if own else [])
    return {
        node: ",".join(sorted(found, key=lambda device: (len(device), device)))
        for node, found in by_node.items()
    }


def why_never(bundles: Sequence[Resources], nodes: Sequence[Node]) -> str | None:
    """What the cluster lacks even when it is idle; None where the demand may fit."""
    problems = []
    for name in COUNTED:
        asked = sum(bundle.get(name, 0) for bundle in bundles)
        there = sum(node.total.get(name, 0) for node in nodes)
        if asked > there:
            problems.append(f"{asked - there:g} {name} ({asked:g} asked, {there:g} there)")
    for bundle, wanted in Counter(tuple(sorted(bundle.items())) for bundle in bundles).items():
        need = dict(bundle)
        room = sum(_how_often(need, node.total) for node in nodes)
        if room < wanted and not problems:
            problems.append(
                f"nodes with {describe(need)} together: {wanted} times on one node each, {room} fit"
            )
    return ", ".join(problems) or None


def describe_wait(bundles: Sequence[Resources], nodes: Sequence[Node]) -> list[str]:
    """What is asked, and what is free, a line per node."""
    kinds = Counter(describe(bundle) for bundle in bundles)
    lines = ["asked: " + " + ".join(f"{count} x ({kind})" for kind, count in kinds.items())]
    shown = list(nodes)[:NODES_SHOWN]
    lines += [f"  {node.label}: {_describe_free([node])} free" for node in shown]
    if len(nodes) > len(shown):
        rest = list(nodes)[NODES_SHOWN:]
        lines.append(f"  {len(rest)} more nodes: {_describe_free(rest)} free")
    return lines


def describe(resources: Mapping[str, float]) -> str:
    """``2 GPU, 2 CPU``."""
    return ", ".join(f"{resources[name]:g} {name}" for name in COUNTED if resources.get(name))


def _describe_free(nodes: Sequence[Node]) -> str:
    parts = []
    for name in COUNTED:
        total = sum(node.total.get(name, 0) for node in nodes)
        if total:
            parts.append(f"{sum(node.free.get(name, 0) for node in nodes):g} of {total:g} {name}")
    return ", ".join(parts) or "nothing"


def _how_often(need: Mapping[str, float], there: Mapping[str, float]) -> int:
    return min(int(there.get(name, 0) // amount) for name, amount in need.items() if amount > 0)
