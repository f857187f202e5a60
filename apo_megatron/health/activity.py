"""What the main thread of this process is at: written by whoever does it, read by the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

STARTING, BETWEEN = "start", "between phases"


@dataclass
class Place:
    """Step (from 1; 0: before the first), phase, and how far it is; ``total`` None: nobody knows."""

    step: int = 0
    phase: str = STARTING
    done: int = 0
    total: int | None = None
    micro_batch: int = 0  # the one whose forward pass began last, from 1; 0: none
    num_micro_batches: int = 0

    def values(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: getattr(self, name) for name in _PLACE_FIELDS}

    def __str__(self) -> str:
        """``step 3, update (96 of 256), micro-batch 2 of 8``."""
        count = f" ({self.done} of {self.total})" if self.total else f" ({self.done})" if self.done else ""
        parts = [f"step {self.step}" if self.step else "before the first step", self.phase + count]
        if self.micro_batch:
            parts.append(f"micro-batch {self.micro_batch} of {self.num_micro_batches}")
        return ", ".join(parts)


_PLACE_FIELDS = tuple(field.name for field in fields(Place))


class Activity(Place):
    """The place of this process as it changes. ``listener`` hears of a new step, phase or micro-batch."""

    listener: Callable[[], None] | None = None

    @contextmanager
    def inside(self, phase: str, total: int | None) -> Iterator[None]:
        """``phase`` until the block ends, then the one around it."""
        around = self.phase, self.done, self.total
        self._move(phase, 0, total)
        yield
        self._move(*around)  # not after an error: where it came from is of interest

    @contextmanager
    def micro_batches(self, count: int) -> Iterator[None]:
        """A pass over ``count`` micro-batches."""
        self.micro_batch, self.num_micro_batches = 0, count
        yield
        self.micro_batch = self.num_micro_batches = 0
        self._tell()

    def next_micro_batch(self) -> None:
        """Its forward pass begins."""
        self.micro_batch += 1
        self._tell()

    def begin_step(self, step: int) -> None:
        """What follows belongs to ``step``, until the next call."""
        self.step = step
        self._move(BETWEEN, 0, None)

    def restart(self) -> None:
        """A run begins."""
        self.step = self.micro_batch = self.num_micro_batches = 0
        self._move(STARTING, 0, None)

    def _move(self, phase: str, done: int, total: int | None) -> None:
        self.phase, self.done, self.total = phase, done, total
        self._tell()

    def _tell(self) -> None:
        if self.listener is not None:
            self.listener()


current = Activity()  # of this process: it does one thing at a time
