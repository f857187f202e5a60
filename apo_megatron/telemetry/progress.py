"""What a run shows while it works: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

SECONDS_BETWEEN_LINES = 10.0  # of one phase, without a terminal
SECONDS_BETWEEN_STEP_LINES = 0.25  # faster steps share a line; metrics.jsonl has them all
STEPS_OF_ESTIMATE = 32  # the time left comes from the mean of so many last steps
EVALUATION = "evaluation"  # not counted as the time of a step
# Tokens per second of a step are those of the first of these phases that reported tokens.
THROUGHPUT_PHASES = ("rollout", "cold start", "update")

# What a step line shows, where the metrics have it: label, names (summed), format.
STEP_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("loss", ("loss",), ".4f"),
    ("reward", ("reward",), ".3f"),
    ("pass@1", ("eval/pass_at_1",), ".3f"),
    ("entropy", ("entropy",), ".3f"),
    ("anchor mass", ("anchor_mass",), ".3f"),
    ("clip", ("clip_fraction_low", "clip_fraction_high"), ".3f"),
    ("grad", ("grad_norm",), ".3g"),
)


class Advance(Protocol):
    """What a phase yields: ``n`` more of its total are done, and ``tokens`` went through the model."""

    def __call__(self, n: int, tokens: int = 0) -> None: ...


@dataclass
class _Phase:
    name: str
    total: int | None
    started: float
    done: int = 0
    tokens: int = 0

    def rate_text(self, now: float) -> str:
        seconds = now - self.started
        return f"{short_count(self.tokens / seconds)} tokens/s" if self.tokens and seconds > 0 else ""

    def left_text(self, now: float) -> str:
        if not self.total or not self.done:
            return ""
        left = (now - self.started) * (self.total - self.done) / self.done
        return f"{duration(left)} left"


class RunDisplay:
    """Shows phases and steps of one run; a context manager, so that the terminal is always restored.

    Every rank makes one and calls the same methods: off the main rank only the timers work. Phases may
    follow each other in any order; one that runs inside another counts in both timers.
    """

    def __init__(self, total_steps: int, is_main: bool, title: str, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._seconds: defaultdict[str, float] = defaultdict(float)  # per phase, since timings()
        self._timings_taken = monotonic()
        self._step_seconds: deque[float] = deque(maxlen=STEPS_OF_ESTIMATE)
        self._step_started: float | None = None  # None until the first phase that is not an evaluation
        self._step_tokens: defaultdict[str, int] = defaultdict(int)
        self._step_evaluation_seconds = 0.0
        self._steps_done = 0
        self._last_line = monotonic()
        self._last_step_line = -SECONDS_BETWEEN_STEP_LINES
        self._console = (console or Console(highlight=False)) if is_main else None
        self._bars: Progress | None = None
        self._run_bar: TaskID | None = None
        self._phase_bars: dict[str, TaskID] = {}
        if self._console is not None and self._console.is_terminal:
            self._bars = _bars(self._console)
            self._run_bar = self._bars.add_task(title, total=total_steps, rate="", left="")
            self._bars.start()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Times a phase of ``total`` things (None = unknown) and yields its ``advance``."""
        phase = _Phase(name, total, started=monotonic())
        if self._step_started is None and name != EVALUATION:
            self._step_started = phase.started
        bar = self._show_bar(name, total)

        def advance(n: int, tokens: int = 0) -> None:
            phase.done += n
            phase.tokens += tokens
            self._show(phase, bar)

        try:
            yield advance
        finally:
            self._finish(phase, bar)

    def step_line(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for the finished ``step`` (from 1): the metrics a person watches, speed, time left.

        ``metrics`` may hold anything; what STEP_COLUMNS names is shown, where it is there.
        """
        now = monotonic()
        seconds = now - (now if self._step_started is None else self._step_started)
        self._step_seconds.append(seconds)
        self._step_started = now
        self._steps_done = step
        is_due = step == self._total_steps or now - self._last_step_line >= SECONDS_BETWEEN_STEP_LINES
        if self._console is not None and is_due:
            self._last_step_line = now
            width = len(str(self._total_steps))
            columns = [f"step {step:>{width}}/{self._total_steps}", *_metric_columns(metrics)]
            own_seconds = max(seconds - self._step_evaluation_seconds, 1e-9)
            own_tokens = (self._step_tokens[phase] for phase in THROUGHPUT_PHASES)  # of this rank
            tokens = metrics.get("response_tokens") or next(filter(None, own_tokens), 0)
            if tokens:
                columns.append(f"{short_count(tokens / own_seconds)} tokens/s")
            columns += [f"{own_seconds:.2f} s/step", self._run_left_text()]
            self._print(" | ".join(columns))
        if self._bars is not None and self._run_bar is not None:
            self._bars.update(self._run_bar, completed=step, left=self._run_left_text())
        self._step_tokens.clear()
        self._step_evaluation_seconds = 0.0

    def note(self, text: str) -> None:
        """A line of its own, above the bars on a terminal."""
        self._print(text)

    def timings(self) -> dict[str, float]:
        """Seconds since the last call: ``time/<phase>`` of each phase, and ``time/step`` of everything."""
        now = monotonic()
        seconds = {"time/" + re.sub(r"\W", "_", name): spent for name, spent in self._seconds.items()}
        seconds["time/step"] = now - self._timings_taken
        self._seconds.clear()
        self._timings_taken = now
        return seconds

    def close(self) -> None:
        """Take the bars away; safe to call twice."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show_bar(self, name: str, total: int | None) -> TaskID | None:
        if self._bars is None:
            return None
        if name not in self._phase_bars:
            self._phase_bars[name] = self._bars.add_task(f"  {name}", total=total, rate="", left="")
        else:  # a new bar would redraw the screen at once: milliseconds, several times a step
            bar = self._phase_bars[name]
            self._bars.update(bar, total=total, completed=0, visible=True, rate="", left="")
        return self._phase_bars[name]

    def _show(self, phase: _Phase, bar: TaskID | None) -> None:
        if self._console is None:
            return
        now = monotonic()
        if self._bars is not None and bar is not None:
            self._bars.update(bar, completed=phase.done, rate=phase.rate_text(now), left=phase.left_text(now))
        elif self._bars is None and now - self._last_line >= SECONDS_BETWEEN_LINES:
            count = f"{phase.done}/{phase.total}" if phase.total else str(phase.done)
            parts = [f"  {phase.name} {count}", phase.rate_text(now), phase.left_text(now)]
            if self._steps_done:
                parts.append(f"run: {self._run_left_text()}")
            self._print(" | ".join(part for part in parts if part))

    def _finish(self, phase: _Phase, bar: TaskID | None) -> None:
        now = monotonic()
        seconds = now - phase.started
        self._seconds[phase.name] += seconds
        self._step_tokens[phase.name] += phase.tokens
        if phase.name == EVALUATION and self._step_started is not None:
            self._step_evaluation_seconds += seconds
        if self._bars is not None and bar is not None:
            self._bars.update(bar, visible=False)
        elif self._console is not None and min(seconds, now - self._last_line) >= SECONDS_BETWEEN_LINES:
            rate = phase.rate_text(now)
            self._print(f"  {phase.name} done in {duration(seconds)}{' | ' + rate if rate else ''}")

    def _run_left_text(self) -> str:
        if not self._step_seconds:
            return ""
        mean = sum(self._step_seconds) / len(self._step_seconds)
        return f"{duration(mean * max(self._total_steps - self._steps_done, 0))} left"

    def _print(self, text: str) -> None:
        if self._console is None:
            return
        self._last_line = monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``1:54`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short_count(value: float) -> str:
    """``950``, ``3.1k``, ``2.40M``."""
    if value >= 999_950:
        return f"{value / 1e6:.2f}M"
    return f"{value / 1e3:.1f}k" if value >= 999.5 else f"{value:.0f}"


def _metric_columns(metrics: Mapping[str, float]) -> list[str]:
    columns = []
    for label, names, spec in STEP_COLUMNS:
        values = [float(metrics[name]) for name in names if name in metrics]
        if values:
            columns.append(f"{label} {sum(values):{spec}}")
    return columns


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
