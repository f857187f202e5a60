"""Reading ahead of the work, within a bound on memory; dividing work over ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Called with the bytes of a group when it is done, and with those of all groups of this rank.
Progress = Callable[[int, int], None]
# May be read ahead whatever the sizes are: small groups should not wait for each other.
READ_AHEAD_BYTES = 256 * 2**20


def no_progress(num_bytes: int, total_bytes: int) -> None:
    """For callers that show nothing."""


def memory_bound(group_bytes: Iterable[int]) -> int:
    """What all groups that are held at one time may take: twice the largest, and what is read ahead."""
    return 2 * max(group_bytes) + READ_AHEAD_BYTES


def read_ahead(
    items: Sequence[Item], read: Callable[[Item], Result], cost: Callable[[Item], int], max_bytes: int
) -> Generator[Result, None, None]:
    """``read(item)`` of every item, in order, from a thread that works ahead of the caller.

    An item costs ``cost(item)`` bytes from the start of its reading until the caller takes the next result
    (and has dropped its own reference by then). Items are read while the sum is at most ``max_bytes``, and
    always when nothing else is held. What ``read`` raises is raised here.
    """
    waiting = deque(items)
    started: deque[tuple[int, Future[Result]]] = deque()
    held_bytes = 0
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        while waiting or started:
            while waiting and (not started or held_bytes + cost(waiting[0]) <= max_bytes):
                item = waiting.popleft()
                held_bytes += cost(item)
                started.append((cost(item), executor.submit(read, item)))
            num_bytes, future = started.popleft()
            result = future.result()
            del future  # it holds the result, as does the next name
            yield result
            del result
            held_bytes -= num_bytes
    finally:
        executor.shutdown(cancel_futures=True)


def divide_by_size(items: Sequence[Item], size: Callable[[Item], int], num_parts: int) -> list[list[Item]]:
    """The items in ``num_parts`` lists of about equal size, each in the given order.

    Deterministic: the largest first, each to the list that has least.
    """
    loads = [0] * num_parts
    part_of = [0] * len(items)
    for index in sorted(range(len(items)), key=lambda index: -size(items[index])):
        part_of[index] = loads.index(min(loads))
        loads[part_of[index]] += size(items[index])
    return [
        [item for item, its_part in zip(items, part_of, strict=True) if its_part == part]
        for part in range(num_parts)
    ]
