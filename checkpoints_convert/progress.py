"""Bytes done and GB/s: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from apo_megatron.parallel.world import World
from apo_megatron.telemetry.progress import SECONDS_BETWEEN_LINES, duration


class ByteProgress:
    """Shows how far the main rank is; call it with (bytes done since, bytes of this rank in all).

    A context manager, so that the terminal is always restored.
    """

    def __init__(self, title: str, world: World, console: Console | None = None) -> None:
        self._title = title if world.world == 1 else f"{title} (rank 0 of {world.world})"
        self._console = (console or Console(highlight=False, stderr=True)) if world.is_main else None
        self._started = self._last_line = monotonic()
        self._done = 0
        self._bar: Progress | None = None
        if self._console is not None and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=None, rate="")

    def __call__(self, num_bytes: int, total_bytes: int) -> None:
        self._done += num_bytes
        now = monotonic()
        rate = f"{self._done / max(now - self._started, 1e-9) / 1e9:.2f} GB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, total=total_bytes, rate=rate)
        elif self._console is not None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._started) * (total_bytes - self._done) / self._done
            size = f"{self._done / 1e9:.1f} of {total_bytes / 1e9:.1f} GB"
            self._print(f"{self._title}: {size} | {rate} | {duration(left)} left")

    def done(self, what: str, num_bytes: int) -> None:
        """The line that stays; ``num_bytes`` of all ranks."""
        seconds = monotonic() - self._started
        rate = num_bytes / max(seconds, 1e-9) / 1e9
        self._print(f"{what}: {num_bytes / 1e9:.2f} GB in {seconds:.2f} s ({rate:.2f} GB/s)")

    def _print(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
