"""Weights by memory that trainer and server share: for servers on the trainer's machines."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from apo_megatron.parallel.collectives import all_gather_objects, barrier
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import SGLangClient
from apo_megatron.rollout.transports.addresses import is_here, machine_id
from apo_megatron.rollout.transports.delivery import PIECE_BYTES, Body, BucketTransport, Delivery
from apo_megatron.rollout.transports.flat_bucket import FlatBucket
from apo_megatron.rollout.transports.pickled import bucket_payload, call, reference, value
from apo_megatron.rollout.transports.shared_memory import SharedMemory
from apo_megatron.weights.source import WeightSource

UPDATE_PATH = "/update_weights_from_tensor"
_ALIGNMENT = 64  # of a piece in the segment
# Where CUDA IPC says which device: a number, which another process may count otherwise.
_DEVICE_ARGUMENT = 6


@dataclass(frozen=True)
class _Route:
    """The trainer's ranks that a server gets its weights from."""

    owner: int  # talks to it
    memory_ranks: tuple[int, ...]  # for each of its ranks, whose memory it maps; () where it can map none


@dataclass(frozen=True)
class _Flight:
    """A part of the segment that servers are reading."""

    start: int
    end: int
    answers: Future[None]


class TensorTransport(BucketTransport):
    """Sends pickles that refer to memory which the server maps: CUDA IPC on GPUs, shared memory on CPUs.

    A server is served by a rank on its machine. Where there is none, or where /dev/shm is too small, the
    pickles hold the bytes themselves, which always works and takes many times as long.
    """

    def __init__(
        self, parallel: ParallelContext, loop: EventLoopThread, timeout: float, ranks_per_server: int
    ) -> None:
        """Collective."""
        super().__init__(parallel, loop, timeout)
        self._ranks_per_server = ranks_per_server
        self._machines = all_gather_objects(machine_id(), parallel)
        self._routes: dict[str, _Route] = {}
        self._shared_memory = SharedMemory() if self._on_cpu else None
        # During a push: servers that map memory, shared memory, what is being read of it.
        self._mapping: set[str] = set()
        self._segment: Tensor | None = None
        self._flight: _Flight | None = None

    def close(self) -> None:
        """See WeightTransport."""
        if self._shared_memory is not None:
            self._shared_memory.close()

    def _served(self, servers: Sequence[SGLangClient]) -> Sequence[SGLangClient]:
        is_main_machine = self._machines[self._parallel.rank] == self._machines[0]
        here = [is_here(server.url, is_main_machine) for server in servers]
        here_by_rank = all_gather_objects(here, self._parallel)
        self._routes = {}
        for index, server in enumerate(servers):
            near = tuple(rank for rank, flags in enumerate(here_by_rank) if flags[index])
            memory_ranks = memory_ranks_of(_number(server, index), self._ranks_per_server, near)
            owner = memory_ranks[0] if memory_ranks else index % self._parallel.world
            self._routes[server.name] = _Route(owner, memory_ranks)
        return [server for server in servers if self._routes[server.name].owner == self._parallel.rank]

    def _prepare(self, source: WeightSource, delivery: Delivery) -> None:
        self._mapping = {server.name for server in delivery.servers if self._routes[server.name].memory_ranks}
        if self._shared_memory is None or not self._mapping:
            return
        sizes = [spec.num_bytes for spec in source.tensor_specs()]
        num_bytes = max(min(sum(sizes), 2 * PIECE_BYTES), *sizes)
        try:
            self._segment = self._shared_memory.allocate(num_bytes)
        except OSError as error:
            self._mapping = set()
            warnings.warn(
                f"weights travel slowly: /dev/shm has no room for {num_bytes / 2**20:.0f} MiB ({error}): "
                "enlarge it (docker run --shm-size), or set rollout.sglang.weight_transport=broadcast",
                stacklevel=2,
            )

    def _send(self, bucket: FlatBucket, delivery: Delivery, is_last: bool) -> None:
        mapping = [server for server in delivery.servers if server.name in self._mapping]
        others = [server for server in delivery.servers if server.name not in self._mapping]
        if self._shared_memory is None:
            self._send_handles(bucket, mapping, delivery, is_last)
        elif mapping:
            self._send_shared(bucket, self._shared_memory, mapping, delivery, is_last)
        if others:
            flat = value(bucket.flatten(self._parallel.device).cpu())
            body = self._body(bucket_payload(flat, bucket.places), delivery, is_last)
            delivery.submit(others, UPDATE_PATH, body).result()

    def _send_shared(
        self,
        bucket: FlatBucket,
        memory: SharedMemory,
        servers: list[SGLangClient],
        delivery: Delivery,
        is_last: bool,
    ) -> None:
        """Returns while the servers read: meanwhile the next piece is written."""
        assert self._segment is not None
        start = self._free_place(self._segment.numel(), bucket.num_bytes)
        bucket.copy_to(self._segment[start:])
        self._land()
        flat = memory.tensor(self._segment.numel())
        body = self._body(bucket_payload(flat, bucket.places, start), delivery, is_last)
        alive = [server for server in servers if server.name not in delivery.problems]
        answers = delivery.submit(alive, UPDATE_PATH, body)
        self._flight = _Flight(start, start + bucket.num_bytes, answers)

    def _free_place(self, segment_bytes: int, num_bytes: int) -> int:
        """Where in the segment so much can be written; waits where that is being read."""
        if self._flight is None or num_bytes <= self._flight.start:
            return 0
        behind = -(-self._flight.end // _ALIGNMENT) * _ALIGNMENT
        if behind + num_bytes <= segment_bytes:
            return behind
        self._land()
        return 0

    def _land(self) -> None:
        """Wait until the servers have read."""
        if self._flight is not None:
            self._flight.answers.result()
            self._flight = None

    def _send_handles(
        self, bucket: FlatBucket, servers: list[SGLangClient], delivery: Delivery, is_last: bool
    ) -> None:
        """Collective: a server's ranks may map memory of several of ours."""
        flat = bucket.flatten(self._parallel.device)
        torch.get_device_module(flat.device).synchronize()
        # A handle for each server rank, and for no other: torch keeps the memory of each until it was let go.
        names = [
            name for some in all_gather_objects([s.name for s in servers], self._parallel) for name in some
        ]
        mine = {
            (name, place): _handle(flat)
            for name in names
            for place, rank in enumerate(self._routes[name].memory_ranks)
            if rank == self._parallel.rank
        }
        handles = {
            key: handle for some in all_gather_objects(mine, self._parallel) for key, handle in some.items()
        }
        answers = []
        for server in servers:
            payloads = [
                bucket_payload(handles[server.name, place], bucket.places)
                for place in range(self._ranks_per_server)
            ]
            answers.append(delivery.submit([server], UPDATE_PATH, _body(payloads, delivery, is_last)))
        for answer in answers:
            answer.result()
        barrier(self._parallel)  # no rank lets its memory go before all servers have answered

    def _body(self, payload: str, delivery: Delivery, is_last: bool) -> Body:
        """With the same for each rank of a server."""
        return _body([payload] * self._ranks_per_server, delivery, is_last)

    def _finish(self, delivery: Delivery) -> None:
        self._land()
        self._segment = None
        if self._shared_memory is not None:
            self._shared_memory.free()
        else:
            torch.get_device_module(self._parallel.device).ipc_collect()


def memory_ranks_of(number: int, ranks_per_server: int, near: Sequence[int]) -> tuple[int, ...]:
    """The trainer's ranks whose memory the ranks of server ``number`` map; ``near``: those on its machine.

    Colocated servers have the GPUs of the trainer's ranks in order, and see no others: each of their ranks
    maps memory of the trainer's rank on the same GPU. On CPUs any rank of the machine will do.
    """
    if not near:
        return ()
    first = number * ranks_per_server
    places = range(first, first + ranks_per_server)
    return tuple(place if place in near else near[place % len(near)] for place in places)


def _number(server: SGLangClient, position: int) -> int:
    """Of "server-3": 3."""
    number = server.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else position


def _body(payloads: list[str], delivery: Delivery, is_last: bool) -> Body:
    return delivery.update_body(is_last, serialized_named_tensors=payloads, load_format="flattened_bucket")


def _handle(flat: Tensor) -> bytes:
    """Fragment of a pickle: a tensor on an accelerator, mapped where it is unpickled."""
    rebuild, arguments = reductions.reduce_tensor(flat)
    # Devices are numbered differently in other processes. SGLang's unpickler looks the UUID up (it puts a
    # function of its own in the place of torch's).
    device = arguments[_DEVICE_ARGUMENT]
    uuid = torch.get_device_module(flat.device).get_device_properties(device).uuid
    arguments = (*arguments[:_DEVICE_ARGUMENT], str(uuid), *arguments[_DEVICE_ARGUMENT + 1 :])
    return call(reference(rebuild.__module__, rebuild.__qualname__), *map(value, arguments))
