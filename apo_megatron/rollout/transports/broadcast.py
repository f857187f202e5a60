"""Weights by collective communication: for servers on machines or GPUs of their own."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from apo_megatron.parallel.outside_group import OutsideGroup
from apo_megatron.parallel.state import ParallelContext
from apo_megatron.rollout.event_loop import EventLoopThread
from apo_megatron.rollout.sglang_client import ServerError, SGLangClient
from apo_megatron.rollout.transports.addresses import address_towards
from apo_megatron.rollout.transports.delivery import Body, BucketTransport, Delivery, all_of
from apo_megatron.rollout.transports.flat_bucket import FlatBucket
from apo_megatron.weights.source import WeightSource

CLOSE_SECONDS = 5.0


@dataclass
class _Link:
    server: SGLangClient
    group: OutsideGroup
    label: str = ""  # what the server shows since the last push over this group


class BroadcastTransport(BucketTransport):
    """A group for each server: its ranks, and the trainer's rank that serves it.

    Not one group for all: every rank of the trainer has the full tensors, so different ones can send to
    different servers at once, and a server that dies or hangs breaks nobody else's group. Groups stay between
    pushes. A bucket is one broadcast of its bytes, while the call that announces it is under way.
    """

    def __init__(
        self, parallel: ParallelContext, loop: EventLoopThread, timeout: float, ranks_per_server: int
    ) -> None:
        super().__init__(parallel, loop, timeout)
        self._ranks_per_server = ranks_per_server
        self._links: dict[str, _Link] = {}
        self._owners: dict[str, int] = {}  # the same on every rank
        self._buffers = self._no_buffers()
        self._flying: list[tuple[SGLangClient, Future[None], Future[None]]] = []

    def close(self) -> None:
        """Have the servers leave the groups, as far as they still answer."""

        async def leave(link: _Link) -> None:
            with suppress(ServerError):
                body = {"group_name": link.group.name}
                await link.server.post("/destroy_weights_update_group", body, timeout=CLOSE_SECONDS)

        self._loop.run(all_of(leave(link) for link in self._links.values()))
        for name in list(self._links):
            self._cut(name)

    def _served(self, servers: Sequence[SGLangClient]) -> Sequence[SGLangClient]:
        """A server stays with its rank when others come and go: a group is not made again for nothing."""
        for server in servers:
            self._owners.setdefault(server.name, len(self._owners) % self._parallel.world)
        return [server for server in servers if self._owners[server.name] == self._parallel.rank]

    def _prepare(self, source: WeightSource, delivery: Delivery) -> None:
        for server in delivery.servers:
            if server.name in self._links and not self._still_linked(server, delivery):
                self._cut(server.name)
        joining = []
        for server in delivery.servers:
            if server.name not in self._links:
                try:
                    group = self._make_group(server)
                except (OSError, RuntimeError) as error:  # no name, no route, no port
                    delivery.fail(server, f"group with server {server.name}: {error}")
                    continue
                body = {
                    "master_address": group.address,
                    "master_port": group.port,
                    "rank_offset": 1,
                    "world_size": group.size,
                    "group_name": group.name,
                    "backend": group.backend,
                }
                answer = delivery.submit([server], "/init_weights_update_group", body)
                joining.append((server, group.connect(self._timeout), answer))
                self._links[server.name] = _Link(server, group)
        for server, joined, answer in joining:
            self._wait(delivery, server, joined, answer)

    def _still_linked(self, server: SGLangClient, delivery: Delivery) -> bool:
        """Whether it is the process that joined: one that was started anew shows another label."""
        try:
            label = self._loop.run(server.weight_label())
        except ServerError as error:
            delivery.fail(server, str(error))
            return False
        return label == self._links[server.name].label

    def _make_group(self, server: SGLangClient) -> OutsideGroup:
        parallel = self._parallel
        return OutsideGroup(
            # A name of its own: a server refuses one that it knows, also from a group that is broken.
            f"apo_megatron_{secrets.token_hex(4)}",
            address_towards(server.url),
            self._ranks_per_server,
            parallel.device,
            parallel.backend,
        )

    def _send(self, bucket: FlatBucket, delivery: Delivery, is_last: bool) -> None:
        if not delivery.servers:
            return
        if not self._on_cpu:
            self._land(delivery)  # a second buffer would be a bucket's size
        flat = self._next_buffer(bucket.num_bytes)
        bucket.copy_to(flat)
        torch.get_device_module(flat.device).synchronize()  # the threads that send have streams of their own
        self._land(delivery)
        for server in delivery.servers:
            sent = self._links[server.name].group.broadcast(flat, self._timeout)
            body = self._body(server, bucket, delivery, is_last)
            answer = delivery.submit([server], "/update_weights_from_distributed", body)
            self._flying.append((server, sent, answer))

    def _next_buffer(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8: the one before the last, or a larger one."""
        self._buffers.rotate()
        if self._buffers[0].numel() < num_bytes:
            self._buffers[0] = torch.empty(num_bytes, dtype=torch.uint8, device=self._parallel.device)
        return self._buffers[0][:num_bytes]

    def _land(self, delivery: Delivery) -> None:
        """Wait until servers have what was sent to them."""
        for server, sent, answer in self._flying:
            self._wait(delivery, server, sent, answer)
            if not sent.done():  # its memory may still be read
                self._buffers = self._no_buffers()
        self._flying.clear()

    def _body(self, server: SGLangClient, bucket: FlatBucket, delivery: Delivery, is_last: bool) -> Body:
        return delivery.update_body(
            is_last,
            names=[place.name for place in bucket.places],
            dtypes=[str(place.dtype).removeprefix("torch.") for place in bucket.places],
            shapes=[place.shape for place in bucket.places],
            group_name=self._links[server.name].group.name,
            load_format="flattened_bucket",
        )

    def _finish(self, delivery: Delivery) -> None:
        self._land(delivery)
        self._buffers = self._no_buffers()
        for server in delivery.servers:
            self._links[server.name].label = delivery.label

    def _wait(
        self, delivery: Delivery, server: SGLangClient, action: Future[None], answer: Future[None]
    ) -> None:
        """Wait for both ends: ours, and the answer to the call. Where one fails the group is closed, which
        the other end then notices."""
        wait([action, answer], self._timeout, FIRST_COMPLETED)
        if server.name not in delivery.problems:
            try:
                action.result(self._timeout)
            except (RuntimeError, TimeoutError) as error:
                delivery.fail(server, f"group with server {server.name}: {error or 'no end in time'}")
        if server.name in delivery.problems:
            self._cut(server.name)
        answer.result()
        if server.name in delivery.problems:
            self._cut(server.name)

    def _cut(self, name: str) -> None:
        link = self._links.pop(name, None)
        if link is not None:
            link.group.close()

    def _no_buffers(self) -> deque[Tensor]:
        empty = torch.empty(0, dtype=torch.uint8, device=self._parallel.device)
        return deque([empty] * (2 if self._on_cpu else 1))
