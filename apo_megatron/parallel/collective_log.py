"""How many collectives this process has issued, by group, and the last one.

All members of a group issue its collectives in the same order. So a member whose count is lower is the one
that the others wait for; a count of all groups together says nothing, for pipeline stages differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# What torch.distributed calls on a group, in all versions of torch that we support. All of its functions,
# under whatever name somebody has imported them, end in one of these.
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "gather", "scatter"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)


@dataclass
class GroupCount:
    """Collectives of one group, or messages from one member to another, counted by this rank.

    ``key`` is the same on all members and unlike that of other groups; ``label`` is for people; ``ranks`` are
    those of the world. A message counts where it is sent, and where it is received.
    """

    key: str
    label: str
    ranks: tuple[int, ...]
    count: int = 0


@dataclass
class CollectiveLog:
    """Written by whoever communicates, read by the thread that stamps; neither waits for the other."""

    num_issued: int = 0
    last: tuple[str, GroupCount, int] | None = None  # name, group, elements of the first tensor
    # By id of the group: no group is kept alive. Messages: by id, sender and receiver within the group.
    groups: dict[Any, GroupCount] = field(default_factory=dict)

    def record(self, name: str, group: dist.ProcessGroup, payload: Any) -> None:
        """A collective of ``group``; ``payload`` is its first argument."""
        counted = self.groups.get(id(group))
        if counted is None:
            counted = self.groups[id(group)] = _group_count(group)
        self._count(name, counted, payload)

    def record_message(
        self, name: str, group: dist.ProcessGroup, payload: Any, sender: int, receiver: int
    ) -> None:
        """A message within ``group``; sender and receiver are ranks of the group."""
        place = (id(group), sender, receiver)
        counted = self.groups.get(place)
        if counted is None:
            members = dist.get_process_group_ranks(group)
            ends = members[sender], members[receiver]
            label = f"messages from rank {ends[0]} to rank {ends[1]} in {_name(group)}"
            counted = GroupCount(f"{group.group_name}:{sender}>{receiver}", label, ends)
            self.groups[place] = counted
        self._count(name, counted, payload)

    def _count(self, name: str, counted: GroupCount, payload: Any) -> None:
        counted.count += 1
        self.num_issued += 1
        while isinstance(payload, (list, tuple)) and payload:
            payload = payload[0]
        self.last = (name, counted, payload.numel() if isinstance(payload, torch.Tensor) else 0)

    def clear(self) -> None:
        """Forget everything, also which groups there are."""
        self.num_issued, self.last = 0, None
        self.groups.clear()


log = CollectiveLog()  # of this process: its groups are global, too
_installed: list[str] = []


def install() -> None:
    """Count what this process issues from now on in ``log``; no effect the second time."""
    if _installed:
        return
    for name in _COLLECTIVES:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, _counted(name, getattr(dist.ProcessGroup, name)))
            _installed.append(name)
    dist.ProcessGroup.send = _counted_message("send", dist.ProcessGroup.send, is_sender=True)  # type: ignore[method-assign]
    dist.ProcessGroup.recv = _counted_message("recv", dist.ProcessGroup.recv, is_sender=False)  # type: ignore[method-assign]


def _counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    record = log.record

    def counted(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        record(name, group, args[0] if args else None)
        return original(group, *args, **kwargs)

    return counted


def _counted_message(name: str, original: Callable[..., Any], is_sender: bool) -> Callable[..., Any]:
    def counted(group: dist.ProcessGroup, tensors: Sequence[torch.Tensor], peer: int, *tag: int) -> Any:
        ends = (group.rank(), peer) if is_sender else (peer, group.rank())
        log.record_message(name, group, tensors, *ends)
        return original(group, tensors, peer, *tag)

    return counted


def _group_count(group: dist.ProcessGroup) -> GroupCount:
    ranks = tuple(dist.get_process_group_ranks(group))
    return GroupCount(group.group_name, f"{_name(group)} ({rank_list(ranks)})", ranks)


def _name(group: dist.ProcessGroup) -> str:
    """Megatron's, without what is the same in all: ``data_parallel_with_cp``."""
    if group.group_desc == "default_pg":
        return "world"
    return "_".join(word for word in group.group_desc.lower().split("_") if word != "group")


def rank_list(ranks: tuple[int, ...]) -> str:
    """``rank 3``, ``ranks 0-7``, ``ranks 0, 8, ... 56`` (every eighth) or ``ranks 0, 1, 5``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    strides = {after - before for before, after in zip(ranks, ranks[1:], strict=False)}
    if len(ranks) > 2 and strides == {1}:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    if len(ranks) > 3 and len(strides) == 1:
        return f"ranks {ranks[0]}, {ranks[1]}, ... {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))
