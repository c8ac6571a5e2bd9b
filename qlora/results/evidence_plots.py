"""Pictures of evidence: how far plans were off what was measured, and how memory and time grow.

Colours are Okabe and Ito's, as in `qlora.results.plots`; devices also differ in their marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import OutputError
from qlora.results.plots import _BLUE, _GREEN, _GREY, _INK, _ORANGE, _RED, _draw
from qlora.units import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS, _MARKS = (_BLUE, _RED, _GREEN, _ORANGE, _INK), "osD^v"


@dataclass(frozen=True)
class Point:
    """One run: what was planned and measured, in bytes, and on what."""

    planned_bytes: int
    measured_bytes: int
    source: str


@dataclass(frozen=True)
class Curve:
    """How a peak and the time of a token follow one thing, point by point.

    Attributes:
        name, unit: of what changes; `x` are its values.
        parts: of the planned peak, by point.
    """

    name: str
    unit: str
    x: Sequence[float]
    measured_bytes: Sequence[int]
    planned_bytes: Sequence[int]
    measured_seconds: Sequence[float]
    planned_seconds: Sequence[float]
    parts: Sequence[Mapping[str, int]] = field(default=())


def draw_plan_against_measured(points: Sequence[Point], path: Path, *, title: str = "Plan against measured") -> Path:
    """The error of each plan over the size of what was measured: above 0 the plan was too much, below too little.

    Raises:
        OutputError: the file cannot be written, or there is no point.
    """
    if not points:
        raise OutputError("There is nothing measured to draw.", "Name files that `qlora measure --out FILE` has written.")
    errors = [100 * (point.planned_bytes / point.measured_bytes - 1) for point in points]
    large = max(point.measured_bytes for point in points) >= 4 * GIB
    unit, name = (GIB, "GiB") if large else (MIB, "MiB")

    def fill(axes: Axes) -> bool:
        axes.axhline(0, color=_INK, linewidth=1)
        for number, source in enumerate(dict.fromkeys(point.source for point in points)):
            own = [(point.measured_bytes / unit, error) for point, error in zip(points, errors) if point.source == source]
            axes.plot(*zip(*own), _MARKS[number % len(_MARKS)], color=_COLORS[number % len(_COLORS)], markersize=6, alpha=0.8,
                      markeredgecolor="white", label=f"{source} ({len(own)})")
        axes.set_xscale("log")
        highest = max(1.0, 1.15 * max(map(abs, errors)))
        axes.set_ylim(-highest, highest)
        axes.set_xlabel(f"tensors at their highest, measured ({name})", fontsize=12, color=_INK)
        axes.set_ylabel("planned / measured - 1 (%)", fontsize=12, color=_INK)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return True

    return _written(path, title, fill)


def draw_scale(curves: Sequence[Curve], path: Path) -> Path:
    """A column for each curve: the peak above, the time of a token beneath; dots were measured, lines are the plan's.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 6.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        for axes, measured, planned, unit in (
            (rows[0][column], curve.measured_bytes, curve.planned_bytes, MIB),
            (rows[1][column], curve.measured_seconds, curve.planned_seconds, 1e-6),
        ):
            axes.plot(curve.x, [value / unit for value in planned], color=_ORANGE, linewidth=3, label="plan")
            axes.plot(curve.x, [value / unit for value in measured], "o--", color=_BLUE, linewidth=1, markersize=5,
                      label="measured")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(True, color="#E6E6E6", linewidth=0.8)
            axes.tick_params(labelsize=9, colors=_INK, length=0)
            for side in axes.spines.values():
                side.set_color(_GREY)
        rows[0][column].set_title(curve.name, fontsize=12, color=_INK)
        rows[1][column].set_xlabel(curve.unit, fontsize=10, color=_INK)
    rows[0][0].set_ylabel("tensors at their highest (MiB)", fontsize=10, color=_INK)
    rows[1][0].set_ylabel("processor's time per token (µs)", fontsize=10, color=_INK)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11, frameon=False, labelcolor=_INK)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def _written(path: Path, title: str, fill: Callable[[Axes], bool]) -> Path:
    try:
        _draw(path, title, fill)
    except OSError as error:
        raise _cannot_write(path, error) from error
    return path


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}.", "Name a place you may write to.")
