"""Which sequences share a micro-batch, and which rank gets which, by their lengths in tokens."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` [N] in as few bins of ``capacity`` tokens as best-fit decreasing finds.

    A sequence longer than ``capacity`` has a bin for itself. Indices in a bin ascend; the same lengths give
    the same bins. Best-fit decreasing needs at most 11/9 of the optimal number of bins plus one (Johnson
    1973), and hardly more than it where many sequences are short.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens that still fit, bin), ascending
    for index in _longest_first(lengths):
        place = bisect.bisect_left(free, (lengths[index], -1))
        if place == len(free):
            bins.append([index])
            bisect.insort(free, (capacity - lengths[index], len(bins) - 1))
        else:
            room, number = free.pop(place)
            bins[number].append(index)
            bisect.insort(free, (room - lengths[index], number))
    return [sorted(part) for part in bins]


def spread(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices of ``lengths`` [N] in exactly ``num_bins`` bins of nearly equal tokens: longest first, each
    into the emptiest (Graham 1969). Some bins are empty where there are fewer sequences than bins."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in _longest_first(lengths):
        load, number = heapq.heappop(loads)
        bins[number].append(index)
        heapq.heappush(loads, (load + lengths[index], number))
    return [sorted(part) for part in bins]


def pack_into(lengths: Sequence[int], capacity: int, num_bins: int) -> list[list[int]]:
    """``num_bins`` bins that hold at most ``capacity`` tokens each, or one longer sequence; balanced if that
    is possible. ``num_bins`` must not be smaller than ``len(pack(lengths, capacity))``."""
    balanced = spread(lengths, num_bins)
    if all(len(part) <= 1 or sum(lengths[i] for i in part) <= capacity for part in balanced):
        return balanced
    packed = pack(lengths, capacity)
    assert len(packed) <= num_bins, f"{len(packed)} bins are needed, {num_bins} allowed"
    return packed + [[] for _ in range(num_bins - len(packed))]


def deal(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of ``lengths`` [N] for each rank: counts that differ by at most one, and nearly equal tokens.

    The longest ``num_ranks`` sequences go to one rank each, then the next so many, the longest of them to
    the rank with the fewest tokens. Indices of a rank ascend.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    order = _longest_first(lengths)
    for start in range(0, len(order), num_ranks):
        emptiest = sorted(range(num_ranks), key=lambda rank: (loads[rank], rank))
        for rank, index in zip(emptiest, order[start : start + num_ranks], strict=False):
            ranks[rank].append(index)
            loads[rank] += lengths[index]
    return [sorted(part) for part in ranks]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
