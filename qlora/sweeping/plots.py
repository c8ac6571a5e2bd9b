"""The plots of a sweep: held-out loss against each setting that was searched, with its spread, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.results.plots import _BLUE, _GREEN, _GREY, _INK, _ORANGE, _RED, _draw
from qlora.sweeping.results import Point, SweepResult
from qlora.units import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (_BLUE, _RED, _GREEN, _ORANGE, _GREY, _INK)
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(result: SweepResult, folder: Path) -> list[Path]:
    """One picture for each setting with several values, and one of memory and time; returns the files written.

    Raises:
        OSError: they cannot be written.
    """
    points = [point for point in result.points if point.good]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key in result.keys:
        if len({str(point.values[key]) for point in points}) > 1:
            path = folder / f"loss-{key.partition('.')[2]}.png"
            _draw(path, f"Held-out loss by {key}", lambda axes, key=key: _loss(axes, points, key))
            written.append(path)
    if len({point.parameters for point in points}) > 1:
        path = folder / "cost.png"
        _draw(path, "What it costs", lambda axes: _cost(axes, points))
        written.append(path)
    return written


def _loss(axes: Axes, points: Sequence[Point], key: str) -> bool:
    """Dots for seeds, bars for the standard deviation; a line joins points that differ in this setting alone."""
    order = _ordered([point.values[key] for point in points])
    place = {str(value): i for i, value in enumerate(order)}
    lines: dict[str, list[Point]] = {}
    for point in points:
        others = ", ".join(f"{name.partition('.')[2]} {value}" for name, value in point.values.items() if name != key)
        lines.setdefault(others, []).append(point)
    lines = {name: line for name, line in lines.items() if len(line) > 1} or lines
    for number, (name, line) in enumerate(lines.items()):
        line = sorted(line, key=lambda point: place[str(point.values[key])])
        color, offset = _COLORS[number % len(_COLORS)], 0.06 * (number - (len(lines) - 1) / 2) if len(lines) <= 6 else 0.0
        where = [place[str(point.values[key])] + offset for point in line]
        axes.errorbar(where, [point.loss for point in line], yerr=[point.spread for point in line], color=color, linewidth=1.5,
                      marker=_MARKERS[number % len(_MARKERS)], markersize=7, capsize=4,
                      label=name if name and 1 < len(lines) <= 6 else None, zorder=3)
        for at, point in zip(where, line, strict=True):
            axes.plot([at] * len(point.losses), point.losses, linestyle="none", marker="o", markersize=4, color=color, alpha=0.4)
    axes.set_xticks(range(len(order)), [f"{value:g}" if isinstance(value, float) else str(value) for value in order])
    axes.set_xlabel(key, fontsize=12, color=_INK)
    axes.set_ylabel("loss (nats per token)", fontsize=12, color=_INK)
    return True


def _cost(axes: Axes, points: Sequence[Point]) -> bool:
    """Memory on the left, seconds on the right, against the number of trained parameters."""
    points = sorted(points, key=lambda point: point.parameters)
    sizes = [point.parameters for point in points]
    memory = [max(run.measured_bytes for run in point.runs) / MIB for point in points]
    planned = [max(run.planned_bytes for run in point.runs) / MIB for point in points]
    axes.plot(sizes, planned, linestyle="none", marker="s", markersize=8, markerfacecolor="none", color=_GREY,
              label="memory, planned")
    axes.plot(sizes, memory, linestyle="none", marker="o", markersize=5, color=_BLUE, label="memory, measured")
    axes.plot([], [], linestyle="none", marker="^", markersize=6, color=_ORANGE, label="time of a run")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(sizes)), [f"{size:,}" for size in sorted(set(sizes))], rotation=20)
    axes.minorticks_off()
    axes.set_xlabel("trained parameters", fontsize=12, color=_INK)
    axes.set_ylabel("tensors at their highest (MiB)", fontsize=12, color=_INK)
    axes.set_ylim(0, 1.15 * max(*memory, *planned))
    right = axes.twinx()
    seconds = [[run.seconds for run in point.runs] for point in points]
    means = [sum(each) / len(each) for each in seconds]
    right.plot(sizes, means, linestyle="none", marker="^", markersize=6, color=_ORANGE)
    right.set_ylim(0, 1.15 * max(means))
    right.set_ylabel("seconds", fontsize=12, color=_INK)
    right.tick_params(labelsize=11, colors=_INK, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)
    return True


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once; numbers by size, others as they came."""
    unique = list({str(value): value for value in values}.values())
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in unique)
    return sorted(unique) if numbers else unique
