"""Pass@1 against Pass@n: where each method ends, beside the base it started from. Imports matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from methods import ADVANTAGE, BASELINE, LOSS, SAMPLES, VARIANT

from apo_megatron.telemetry.plots import DPI, LOOK

BASE_POINT = "where all start"
# Colours and shapes that stay apart for the colour-blind (Okabe and Ito, 2008).
STYLES = {
    BASE_POINT: ("#444444", "s"),
    BASELINE: ("#0072B2", "o"),
    LOSS: ("#D55E00", "^"),
    VARIANT: ("#CC79A7", "v"),
    ADVANTAGE: ("#009E73", "D"),
    SAMPLES: ("#7A6A00", "P"),
}
LABEL_SIZE = 8.5
# Of methods within so many median deviations of the median, this many need a panel of their own.
LARGE_CROWD, FAR = 12, 5.0
SMALLEST_MARGIN = 0.5  # per cent, where all end at the same Pass@n
# Where a label may stand: so many pixels from its point, in so many directions.
DISTANCES = (9, 16, 26, 40, 58, 80, 110, 150)
NUM_DIRECTIONS = 24


@dataclass(frozen=True)
class Point:
    """One method: where each seed stands, (Pass@1, Pass@n) in per cent."""

    label: str
    family: str  # key of STYLES
    seeds: Sequence[tuple[float, float]]

    @property
    def mean(self) -> tuple[float, float]:
        x, y = zip(*self.seeds, strict=True)
        return statistics.fmean(x), statistics.fmean(y)


def frontier_picture(points: Sequence[Point], path: Path, num_samples: int) -> list[Bbox]:
    """Draw ``points`` into ``path``; where the labels stand, in pixels.

    The mean over seeds is large and labelled, each seed small and tied to it. Where many methods end at much
    the same place a second panel enlarges it, and has their labels.
    """
    crowd = _crowd(points)
    others = [point for point in points if point not in crowd]
    with plt.rc_context(LOOK):
        height, ratios = (13.0, (1, 1.2)) if crowd else (7.6, (1,))
        figure, rows = plt.subplots(
            len(ratios), 1, figsize=(11, height), height_ratios=ratios, squeeze=False, layout="constrained"
        )
        axes = [row[0] for row in rows]
        for axis in axes:
            for family in STYLES:
                _draw_family(axis, [point for point in points if point.family == family], family)
            axis.set_xlabel("Pass@1 (%)")
            axis.set_ylabel(f"Pass@{num_samples} (%)")
            axis.margins(0.07)
        axes[0].set_title("Countdown, test problems: right = better single answers, up = more within reach")
        axes[0].legend(loc="lower left", fontsize=9)
        if crowd:
            _enlarge(axes[1], axes[0], crowd)
        figure.canvas.draw()  # settles the layout
        figure.set_layout_engine("none")
        for axis in axes:
            axis.set_autoscale_on(False)  # the lines to labels must not move the points
        boxes = [
            box
            for axis, labelled in zip(axes, (others, crowd), strict=False)
            for box in _place_labels(figure, axis, points, labelled)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
    return boxes


def _crowd(points: Sequence[Point]) -> list[Point]:
    """Those that end near the median, if they are too many to be told apart beside the others."""
    limits = []
    for values in zip(*(point.mean for point in points), strict=True):
        middle = statistics.median(values)
        spread = statistics.median(abs(value - middle) for value in values)
        limits.append((middle - FAR * spread, middle + FAR * spread))
    crowd = [
        point
        for point in points
        if all(low <= value <= high for value, (low, high) in zip(point.mean, limits, strict=True))
    ]
    return crowd if LARGE_CROWD <= len(crowd) < len(points) else []


def _enlarge(axis: Axes, whole: Axes, crowd: Sequence[Point]) -> None:
    """``axis`` shows the region of ``crowd`` alone, which ``whole`` frames."""
    limits = []
    for values in zip(*(point.mean for point in crowd), strict=True):
        margin = max(0.12 * (max(values) - min(values)), SMALLEST_MARGIN)
        limits.append((min(values) - margin, max(values) + margin))
    (left, right), (bottom, top) = limits
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_title("The frame above, enlarged")
    whole.add_patch(
        Rectangle((left, bottom), right - left, top - bottom, fill=False, ec="#444444", lw=0.8, zorder=2)
    )


def _draw_family(axis: Axes, points: Sequence[Point], family: str) -> None:
    color, marker = STYLES[family]
    for point in points:
        x, y = point.mean
        for seed in point.seeds:
            axis.plot((x, seed[0]), (y, seed[1]), color=color, lw=0.6, alpha=0.25, zorder=1)
            axis.plot(*seed, marker, color=color, ms=3, alpha=0.35, mew=0, zorder=1)
    means = [point.mean for point in points]
    if means:
        x_values, y_values = zip(*means, strict=True)
        axis.plot(x_values, y_values, marker, color=color, ms=8, mec="white", mew=0.8, label=family, zorder=3)


def _place_labels(
    figure: Figure, axis: Axes, points: Sequence[Point], labelled: Sequence[Point]
) -> list[Bbox]:
    """Each label at the nearest place where it covers none of ``points`` and no other label."""
    scale = figure.dpi / 72
    to_pixels, frame = axis.transData.transform, axis.get_window_extent()
    anchors = {point.label: tuple(map(float, to_pixels(point.mean))) for point in points}
    size = 6 * scale
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in anchors.values()]
    legend = axis.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    boxes = []
    for point in sorted(labelled, key=lambda point: -anchors[point.label][1]):
        x, y = anchors[point.label]
        text = axis.text(0, 0, point.label, fontsize=LABEL_SIZE, color=STYLES[point.family][0],
                         transform=None, va="bottom", ha="left", zorder=4)  # fmt: skip
        extent = text.get_window_extent()
        box = _free_place(x, y, extent.width, extent.height, scale, taken, frame)
        text.set_transform(axis.transData)
        corner = axis.transData.inverted().transform((box.x0, box.y0))
        text.set_position((float(corner[0]), float(corner[1])))
        near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        if math.dist(near, (x, y)) > 12 * scale:
            (x0, y0), (x1, y1) = axis.transData.inverted().transform([(x, y), near])
            axis.plot((x0, x1), (y0, y1), color="#999999", lw=0.6, zorder=2)
        taken.append(box)
        boxes.append(box)
    return boxes


def _free_place(
    x: float, y: float, width: float, height: float, scale: float, taken: Sequence[Bbox], frame: Bbox
) -> Bbox:
    """The nearest box of this size around (x, y) that overlaps least with ``taken``, inside ``frame``."""
    best, least = Bbox.from_bounds(x, y, width, height), math.inf
    for distance in DISTANCES:
        for i in range(NUM_DIRECTIONS):
            angle = 2 * math.pi * i / NUM_DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            left = x + distance * scale * across + (across - 1) / 2 * width
            bottom = y + distance * scale * up + (up - 1) / 2 * height
            box = Bbox.from_bounds(left, bottom, width, height)
            overlap = sum(_common_area(box, other) for other in taken)
            overlap += width * height - _common_area(box, frame)
            if overlap < least - 1e-6:
                best, least = box, overlap
        if least <= 0.5:
            break
    return best


def _common_area(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
