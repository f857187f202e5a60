"""Pictures of runs: Pass@K curves and training curves. Imports matplotlib; only who draws imports this."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from apo_megatron.telemetry.metrics import METRICS_FILE, read_metrics
from apo_megatron.telemetry.series import History, series, smooth

RUN_PICTURE = "training_curves.png"
BASE = "base"
DPI = 150


@dataclass(frozen=True)
class Style:
    label: str
    color: str
    line: str = "-"


# Colours that stay apart for the colour-blind (Okabe and Ito, 2008).
STYLES: dict[str, Style] = {
    BASE: Style("base", "#666666", "--"),
    "grpo": Style("GRPO", "#D55E00"),
    "apo": Style("APO", "#0072B2"),
    "grpo_kl": Style("GRPO + KL", "#009E73"),
    "kl_on_wrong": Style("KL on wrong", "#CC79A7"),
}
_OTHER_COLORS = ("#E69F00", "#56B4E9", "#000000", "#A6761D")


@dataclass(frozen=True)
class Panel:
    """One small plot against steps. The first of ``keys`` that a history has is drawn."""

    title: str
    keys: tuple[str, ...]
    percent: bool = False
    points: bool = False  # few values (evaluations): markers, no smoothing


COMPARISON_PANELS = (
    Panel("Reward on training prompts (%)", ("reward",), percent=True),
    Panel("Pass@1, held out (%)", ("eval/pass_at_1",), percent=True, points=True),
    Panel("Pass@32, held out (%)", ("eval/pass_at_32",), percent=True, points=True),
    Panel("Entropy (nats per token)", ("entropy",)),
    Panel("Anchor mass P", ("anchor_mass",)),
    Panel("Support coverage", ("support_coverage",)),
)
RUN_PANELS = (
    Panel("Loss", ("loss",)),
    *COMPARISON_PANELS,
    Panel("Anchor ratio a, median", ("anchor_ratio_p50",)),
    Panel("Share of tokens clipped low", ("clip_fraction_low",)),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Groups with mixed rewards (%)", ("mixed_group_share",), percent=True),
    Panel("Response length (tokens)", ("response_length",)),
    Panel("Responses cut off (%)", ("truncation_rate",), percent=True),
    Panel("Seconds per step", ("time/step",)),
)
LOOK: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def style_of(method: str, methods: Sequence[str]) -> Style:
    """The same look for a method in every picture; unknown methods take further colours in their order."""
    if method in STYLES:
        return STYLES[method]
    unknown = [name for name in methods if name not in STYLES]
    return Style(method, _OTHER_COLORS[unknown.index(method) % len(_OTHER_COLORS)])


def comparison_picture(
    results: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[History]],
    path: str | Path,
    title: str = "",
) -> Path:
    """Pass@K curves with their intervals beside the training curves of all methods, as one PNG.

    ``results``: method -> {"pass_at_k": {"1": ..}, "ci95": {"1": [low, high]}}, fractions in [0, 1].
    ``histories``: method -> the metrics of each of its runs; several runs are drawn thin, their mean thick.
    """
    methods = list(results)
    panels = [
        p for p in COMPARISON_PANELS if any(_series(run, p)[0].size for h in histories.values() for run in h)
    ]
    columns = 2 if len(panels) <= 4 else 3
    with plt.rc_context(LOOK):
        figure = plt.figure(figsize=(6.4 + 3.1 * columns, 6.6), layout="constrained")
        halves: Any = figure.subfigures(1, 2, width_ratios=(6.0, 3.1 * columns))
        left, right = halves
        _draw_pass_at_k(left.subplots(), results)
        axes = np.atleast_1d(right.subplots(-(-max(len(panels), 1) // columns), columns)).ravel()
        for axis, panel in zip(axes, panels, strict=False):
            for method in (name for name in methods if name in histories):
                _draw_runs(axis, panel, histories[method], style_of(method, methods))
            _finish_panel(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if title:
            figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        return _save(figure, path)


def run_picture(run_dir: str | Path) -> Path | None:
    """Draw ``run_dir/metrics.jsonl`` into ``run_dir/training_curves.png``; None where nothing was logged."""
    history = read_history(run_dir)
    panels = [panel for panel in RUN_PANELS if _series(history, panel)[0].size]
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    with plt.rc_context(LOOK):
        figure, grid = plt.subplots(
            rows, columns, figsize=(3.3 * columns, 2.5 * rows + 0.3), layout="constrained", squeeze=False
        )
        for axis, panel in zip(grid.ravel(), panels, strict=False):
            _draw_runs(axis, panel, [history], Style("", "#0072B2"))
            _finish_panel(axis, panel)
        for axis in grid.ravel()[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(str(run_dir), fontsize=11, x=0.01, ha="left")
        return _save(figure, Path(run_dir) / RUN_PICTURE)


def read_history(run_dir: str | Path, start_evaluation: str | Path | None = None) -> list[dict[str, float]]:
    """The metrics of a run, with the evaluations before its first and after its last step among them.

    ``start_evaluation``: where another run evaluated the policy that this one started from. Raises
    FileNotFoundError where there are no metrics, DataError where they cannot be read.
    """
    run_dir = Path(run_dir)
    history = read_metrics(run_dir / METRICS_FILE)
    last_step = max((line["step"] for line in history), default=0)
    start = Path(start_evaluation or run_dir / "evaluation_start.json")
    for step, path in ((0, start), (last_step, run_dir / "evaluation_final.json")):
        if path.exists():
            pass_at_k = json.loads(path.read_text())["pass_at_k"]
            history.append({"step": step, **{f"eval/pass_at_{k}": value for k, value in pass_at_k.items()}})
    return history


def _draw_pass_at_k(axis: Axes, results: Mapping[str, Mapping[str, Any]]) -> None:
    ends: list[tuple[float, str, str]] = []
    ks: list[int] = []
    for method, result in results.items():
        style = style_of(method, list(results))
        ks = sorted(int(k) for k in result["pass_at_k"])
        values = 100 * np.array([result["pass_at_k"][str(k)] for k in ks])
        axis.plot(ks, values, style.line, color=style.color, label=style.label, lw=2.2, marker="o", ms=4)
        if result.get("ci95"):
            low, high = 100 * np.array([result["ci95"][str(k)] for k in ks]).T
            axis.fill_between(ks, low, high, color=style.color, alpha=0.15, lw=0)
        ends.append((float(values[-1]), f"{style.label} {values[-1]:.1f}", style.color))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_ylim(0, 103)
    axis.set_xlim(right=ks[-1] * 1.15)
    axis.set_title("Pass@K on held-out problems (%)", fontsize=12)
    axis.set_xlabel("K, samples per problem (band: 95 % interval over problems)")
    axis.legend(loc="lower right", fontsize=10.5, handlelength=2.8)
    for height, (_, text, color) in zip(_spread([end[0] for end in ends], 4.5), ends, strict=True):
        axis.annotate(text, (ks[-1], height), xytext=(12, 0), textcoords="offset points", color=color,
                      va="center", fontweight="bold", annotation_clip=False)  # fmt: skip


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels at ``values``: neighbours that are closer than ``gap`` push each other apart."""
    heights = list(values)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    for _ in range(100):  # converges long before, for a handful of labels
        for above, below in zip(order, order[1:], strict=False):
            overlap = max(gap - (heights[above] - heights[below]), 0.0)
            heights[above] += overlap / 2
            heights[below] -= overlap / 2
    return heights


def _draw_runs(axis: Axes, panel: Panel, runs: Sequence[History], style: Style) -> None:
    """Several runs: each thin, their mean thick. One run: its values thin, their running mean thick."""
    scale = 100 if panel.percent else 1
    found = [_series(run, panel) for run in runs]
    drawn = [(steps, scale * values) for steps, values in found if steps.size]
    if not drawn:
        return
    steps, mean = _mean_of_runs(drawn)
    if panel.points:
        axis.plot(steps, mean, style.line, color=style.color, lw=1.9, marker="o", ms=3.5, zorder=3)
    else:
        marker = "." if len(steps) < 10 else ""
        axis.plot(steps, smooth(mean), style.line, color=style.color, lw=1.9, marker=marker, zorder=3)
    for steps, values in drawn:
        if len(drawn) > 1:
            shown = values if panel.points else smooth(values)
            axis.plot(steps, shown, color=style.color, alpha=0.4, lw=0.8, zorder=2)
        elif not panel.points:
            axis.plot(steps, values, color=style.color, alpha=0.3, lw=0.8, zorder=1)


def _series(history: History, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n] of the first of the panel's keys that has any."""
    for key in panel.keys:
        steps, values = series(history, key)
        if steps.size:
            return steps, values
    return np.array([]), np.array([])


def _mean_of_runs(runs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the runs at the steps that all of them have."""
    steps = runs[0][0]
    for other, _ in runs[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.mean([values[np.isin(own, steps)] for own, values in runs], axis=0)


def _finish_panel(axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.margins(x=0.02)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
