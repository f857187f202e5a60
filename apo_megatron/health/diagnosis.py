"""Which rank the others wait for, as far as the last signs of life say; no files, no clocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apo_megatron.health.processes import STATES
from apo_megatron.health.stamp import CollectiveCount, Stamp
from apo_megatron.parallel.collective_log import rank_list

# The state of a rank's process, a letter of STATES: "" for one on another host, None where it is gone.
StateOf = Callable[[Stamp], str | None]

_OWN_CODE = "/apo_megatron/"


@dataclass(frozen=True)
class Diagnosis:
    """``behind``: the ranks that hold the others up, none where the stamps do not say; ``sentences``: why."""

    behind: tuple[int, ...]
    sentences: tuple[str, ...]


def diagnose(stamps: Sequence[Stamp | None], now: float, silent_after: float, state_of: StateOf) -> Diagnosis:
    """Compare the ranks' last ``stamps``, in rank order.

    ``now`` is Unix time; a rank whose stamp is older than ``silent_after`` seconds gives no sign of life.

    A rank that is gone, silent or at its end is behind. Otherwise ranks are compared by the collectives of
    the groups they share: who has issued fewer than another member is waited for, and behind is who is waited
    for and waits for nobody.
    """
    found: dict[int, str] = {}
    for rank, stamp in enumerate(stamps):
        reason = _why_lost(rank, stamp, now, silent_after, state_of)
        if reason is not None:
            found[rank] = reason
    present = [stamp for stamp in stamps if stamp is not None]
    if not found:
        found = _behind_in_collectives(present)
    waiting = [stamp for stamp in present if stamp.rank not in found]
    if not found:
        return Diagnosis((), (_nobody_is_behind(present), *_where(waiting)))
    return Diagnosis(tuple(found), (*found.values(), *_where(waiting)))


def is_silent(stamp: Stamp, now: float, silent_after: float) -> bool:
    """Whether the rank gives no sign of life any more."""
    return now - stamp.time > silent_after


def idle_seconds(stamp: Stamp, now: float, silent_after: float) -> float:
    """Seconds since progress was last seen. What a live rank has done since its stamp is not known: none."""
    return stamp.idle_seconds + (now - stamp.time if is_silent(stamp, now, silent_after) else 0.0)


def _why_lost(
    rank: int, stamp: Stamp | None, now: float, silent_after: float, state_of: StateOf
) -> str | None:
    if stamp is None:
        return f"Rank {rank} is behind: it has never given a sign of life in this run."
    who = f"Rank {rank} (host {stamp.host}, pid {stamp.pid}) is behind"
    if stamp.has_ended:
        return f"{who}: it has left the run, after {stamp.place}."
    if not is_silent(stamp, now, silent_after):
        return None
    state = state_of(stamp)
    if state is None:
        why = "its process is gone"
    elif state == "":
        why = "its process is stopped or gone, or its node is, or cannot write into the run directory"
    else:
        why = f"its process {STATES.get(state, 'is in an unknown state')} (state {state})"
    return (
        f"{who}: no sign of life for {now - stamp.time:.0f} s, {why}. It was in {stamp.place}; the last sign "
        f"came from {_position(stamp)}."
    )


def _behind_in_collectives(stamps: Sequence[Stamp]) -> dict[int, str]:
    """Rank -> why, of those that are waited for and wait for nobody."""
    members = {stamp.rank: stamp for stamp in stamps}
    ahead: dict[int, set[str]] = {rank: set() for rank in members}  # keys of groups
    missing: dict[int, list[tuple[int, int, CollectiveCount]]] = {}  # (own count, highest, group)
    for key, group in {key: group for stamp in stamps for key, group in stamp.groups.items()}.items():
        counts = {rank: _count(members[rank], key) for rank in group.ranks if rank in members}
        lowest, highest = min(counts.values()), max(counts.values())
        for rank, count in counts.items():
            if count > lowest:
                ahead[rank].add(key)
            if count < highest:
                missing.setdefault(rank, []).append((count, highest, group))
    behind = [rank for rank in missing if not ahead[rank]]
    if not behind:  # who is ahead somewhere may have sent ahead, and waits only for what it issued last
        behind = [rank for rank in missing if _last_key(members[rank]) not in ahead[rank]]
    return {rank: _why_behind(members[rank], missing[rank]) for rank in sorted(behind)}


def _why_behind(stamp: Stamp, missing: Sequence[tuple[int, int, CollectiveCount]]) -> str:
    count, highest, group = max(missing, key=lambda item: item[1] - item[0])
    return (
        f"Rank {stamp.rank} (host {stamp.host}, pid {stamp.pid}) is behind: of {group.label} "
        f"it has issued {count}, others {highest}. "
        f"It is in {stamp.place}, at {_position(stamp)}."
    )


def _last_key(stamp: Stamp) -> str:
    return "" if stamp.last_collective is None else stamp.last_collective.key


def _count(stamp: Stamp, key: str) -> int:
    group = stamp.groups.get(key)
    return 0 if group is None else group.count


def _position(stamp: Stamp) -> str:
    """The innermost frame, and where our own code has called it."""
    if not stamp.stack:
        return "an unknown place"
    own = next((line for line in stamp.stack if _OWN_CODE in line), stamp.stack[0])
    return stamp.stack[0] + ("" if own == stamp.stack[0] else f", called by {own}")


def _nobody_is_behind(stamps: Sequence[Stamp]) -> str:
    if len(stamps) == 1:
        return "There is one rank, and it does not move: see where it stands."
    return (
        "No rank is behind by the collectives it has issued: the wait is inside the last one (network, "
        "driver), for something else than a rank (file system, server), or of ranks for each other in "
        "different groups. Compare where they stand."
    )


def _where(waiting: Sequence[Stamp]) -> list[str]:
    """Where the others stand, those at the same place together."""
    places: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for stamp in waiting:
        places[str(stamp.place), stamp.last_collective_text].append(stamp.rank)
    return [
        f"{rank_list(tuple(ranks)).capitalize()}: {place}; last collective: {collective}."
        for (place, collective), ranks in places.items()
    ]
