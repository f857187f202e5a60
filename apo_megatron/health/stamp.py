"""A sign of life: what a rank was doing, as it is written into run_dir/health."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from apo_megatron.files import write_atomically
from apo_megatron.health.activity import Place

HEALTH_FOLDER = "health"  # in the run directory
_PLACE_BYTES = 512


@dataclass(frozen=True)
class CollectiveCount:
    """How many collectives of a group (or messages between two of its members) a rank has issued."""

    label: str
    ranks: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class LastCollective:
    name: str
    key: str  # of its group, in ``Stamp.groups``
    num_elements: int


@dataclass(frozen=True)
class Stamp:
    """State of one rank. Times of different hosts are compared, to the precision of a few seconds."""

    rank: int
    host: str
    pid: int
    process_start: int  # clock ticks after the host's boot: tells processes apart that had the same pid
    time: float  # of this sign of life, Unix time in seconds
    idle_seconds: float  # since the last progress that was seen before ``time``
    place: Place
    num_collectives: int
    last_collective: LastCollective | None
    groups: Mapping[str, CollectiveCount] = field(default_factory=dict)
    stack: tuple[str, ...] = ()  # of the main thread, innermost frame first: "file:line in function"
    has_ended: bool = False  # it has left the run in good order

    @property
    def last_collective_text(self) -> str:
        """``allreduce of 3 elements, tensor_model_parallel (ranks 0-3)``."""
        last = self.last_collective
        if last is None:
            return "none"
        plural = "s" if last.num_elements > 1 else ""
        size = f" of {last.num_elements} element{plural}" if last.num_elements else ""
        return f"{last.name}{size}, {self.groups[last.key].label}"


def write_stamp(run_dir: Path, stamp: Stamp) -> None:
    """Replace the rank's last one. Raises OSError."""
    write_atomically(_stamp_path(run_dir, stamp.rank), json.dumps(asdict(stamp)), durable=False)


def read_stamp(run_dir: Path, rank: int) -> Stamp | None:
    """The last sign of life of ``rank``; None where there is none, or none that can be read.

    Its place may be newer than the rest (``PlaceFile``).
    """
    try:
        content = json.loads(_stamp_path(run_dir, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    last, groups = content["last_collective"], content["groups"]
    content |= {
        "place": Place(**content["place"]),
        "last_collective": None if last is None else LastCollective(**last),
        "groups": {
            key: CollectiveCount(group["label"], tuple(group["ranks"]), group["count"])
            for key, group in groups.items()
        },
        "stack": tuple(content["stack"]),
    }
    stamp = Stamp(**content)
    try:
        return replace(stamp, place=Place(**json.loads(_place_path(run_dir, rank).read_bytes())))
    except (OSError, ValueError):
        return stamp


class PlaceFile:
    """The place of a rank, written by its main thread whenever it changes, in microseconds.

    A rank that freezes between two signs of life has left here where it was.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Raises OSError."""
        self._descriptor = os.open(_place_path(run_dir, rank), os.O_WRONLY | os.O_CREAT)

    def write(self, place: Place) -> None:
        text = json.dumps(place.values()).encode("ascii")
        try:
            os.pwrite(self._descriptor, text.ljust(_PLACE_BYTES), 0)
        except OSError:  # a full disk ends a run where it matters, not here
            pass

    def close(self) -> None:
        os.close(self._descriptor)


def _stamp_path(run_dir: Path, rank: int) -> Path:
    return run_dir / HEALTH_FOLDER / f"rank_{rank:05d}.json"


def _place_path(run_dir: Path, rank: int) -> Path:
    return run_dir / HEALTH_FOLDER / f"rank_{rank:05d}.place"
