"""The plots of a run: loss, learning rate, gradient norm and row lengths, as PNG files.

Colours are Okabe and Ito's, which people who see fewer colours can tell apart; lines also differ in width or style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from qlora.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN, _RED, _INK, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#222222", "#8C8C8C"
_SIZE_INCHES, _DOTS_PER_INCH = (8.0, 4.5), 150
# Up to so many points are drawn as dots on the line; more would run into each other.
_MAX_DOTS = 30

_Point = tuple[int, float]


def draw_all(
    metrics: Sequence[Mapping[str, Any]],
    length_histogram: Sequence[tuple[int, int, int]],
    max_length: int,
    folder: Path,
    *,
    max_grad_norm: float | None = None,
    length_percentiles: Mapping[str, float] | None = None,
) -> list[Path]:
    """Draw what the run has figures for; return the files written into `folder`, which is made if missing.

    Args:
        metrics: rows of metrics.jsonl. Values that are not finite are left out of the lines and marked on the axis.
        length_histogram: (low, high, count) of row lengths in tokens, both ends included, before anything is cut.
        max_length: the cut, in tokens.
        max_grad_norm: where gradients are clipped; None draws no line.
        length_percentiles: {"p50": ..., "p95": ...} in tokens; None reads them off the histogram.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def draw(name: str, title: str, fill: Callable[[Axes], bool]) -> None:
        path = folder / name
        if _draw(path, title, fill):
            written.append(path)

    draw("loss.png", "Loss", lambda axes: _loss(axes, metrics))
    draw("learning_rate.png", "Learning rate", lambda axes: _learning_rate(axes, metrics))
    draw("grad_norm.png", "Gradient norm", lambda axes: _grad_norm(axes, metrics, max_grad_norm))
    draw("lengths.png", "Length of the rows",
         lambda axes: _lengths(axes, length_histogram, max_length, length_percentiles))
    return written


def _draw(path: Path, title: str, fill: Callable[[Axes], bool]) -> bool:
    """One figure; written only if `fill` found something to draw. Uses no global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=14, color=_INK, pad=12)
    axes.grid(True, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=11, colors=_INK, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#BFBFBF")
    if not fill(axes):
        return False
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # beneath the plot, where it hides nothing
        figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(handles) == 4 else 3, fontsize=11,
                      frameon=False, labelcolor=_INK)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return True


# --- one function per plot --------------------------------------------------------------------------------------------


def _loss(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> bool:
    training, training_lost = _series(metrics, "loss")
    held_out, held_out_lost = _series(metrics, "eval_loss")
    if not (training or held_out or training_lost or held_out_lost):
        return False
    if training:
        _line_and_median(axes, training, "training, ")
    if held_out:
        steps, values = zip(*held_out)
        axes.plot(steps, values, color=_RED, linewidth=1.5, linestyle=(0, (4, 2)), marker="o", markersize=6,
                  markeredgecolor="white", zorder=3, label="held-out rows")
    _mark_not_finite(axes, training_lost + held_out_lost)
    values = [value for _, value in training + held_out]
    _limits(axes, _robust(values), floor=0.0)
    _tell_of_higher(axes, values)
    _step_axis(axes)
    axes.set_ylabel("loss (nats per token)", fontsize=12, color=_INK)
    _perplexity_axis(axes)
    return True


def _learning_rate(axes: Axes, metrics: Sequence[Mapping[str, Any]]) -> bool:
    points, lost = _series(metrics, "learning_rate")
    if not points and not lost:
        return False
    if points:
        steps, values = zip(*points)
        axes.plot(steps, values, color=_BLUE, linewidth=2, marker=_dots(values), markersize=5)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.yaxis.get_offset_text().set_fontsize(11)
    _mark_not_finite(axes, lost)
    _limits(axes, [value for _, value in points], floor=0.0)
    _step_axis(axes)
    axes.set_ylabel("learning rate (per step)", fontsize=12, color=_INK)
    return True


def _grad_norm(axes: Axes, metrics: Sequence[Mapping[str, Any]], max_grad_norm: float | None) -> bool:
    points, lost = _series(metrics, "grad_norm")
    if not points and not lost:
        return False
    values = [value for _, value in points]
    if points:
        _line_and_median(axes, points, "")
    if max_grad_norm is not None:
        axes.axhline(max_grad_norm, color=_ORANGE, linewidth=1.5, linestyle=(0, (4, 2)),
                     label=f"clipped above {max_grad_norm:g}")
    _mark_not_finite(axes, lost)
    drawn = values + ([max_grad_norm] if max_grad_norm is not None else [])
    positive = sorted(value for value in drawn if value > 0)
    if positive and positive[-1] > 20 * positive[len(positive) // 2]:
        axes.set_yscale("log")
    else:
        _limits(axes, [0.0, *drawn], floor=0.0)
    _step_axis(axes)
    axes.set_ylabel("L2 norm before clipping", fontsize=12, color=_INK)
    return True


def _lengths(
    axes: Axes, histogram: Sequence[tuple[int, int, int]], max_length: int, percentiles: Mapping[str, float] | None
) -> bool:
    if not any(count for _, _, count in histogram):
        return False
    marks = percentiles or {f"p{share}": percentile(histogram, share / 100) for share in (50, 95)}
    axes.bar([low - 0.5 for low, _, _ in histogram], [count for _, _, count in histogram], align="edge",
             width=[high - low + 1 for low, high, _ in histogram], color=_BLUE, alpha=0.65, edgecolor="white",
             linewidth=0.6)
    longest = max(high for _, high, _ in histogram)
    in_sight = max_length <= 2 * longest
    axes.axvline(max_length, color=_INK, linewidth=2,
                 label=f"max_length: {max_length:,} tokens{'' if in_sight else ', far to the right'}")
    styles = {"p50": (_GREEN, (0, (1, 1))), "p95": (_RED, (0, (4, 2)))}
    for name, value in marks.items():
        color, dashes = styles.get(name, (_GREY, (0, (1, 2))))
        axes.axvline(value, color=color, linewidth=2, linestyle=dashes, label=f"{name}: {value:,.0f} tokens")
    axes.set_xlim(0, 1.05 * (max(longest, max_length) if in_sight else longest) + 0.5)
    axes.set_xlabel("tokens in a row", fontsize=12, color=_INK)
    axes.set_ylabel("rows", fontsize=12, color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(False, axis="x")
    return True


# --- figures from metrics ---------------------------------------------------------------------------------------------


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[_Point], list[int]]:
    """(step, value) where the value is a finite number, and the steps where it is anything else."""
    points, lost = [], []
    for row in metrics:
        if key not in row or "step" not in row:
            continue
        value = row[key]
        if isinstance(value, (int, float)) and math.isfinite(value):
            points.append((int(row["step"]), float(value)))
        else:
            lost.append(int(row["step"]))
    return points, lost


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred running median and the number of steps in its window: a fiftieth of the run, and none for a short run.

    A median, because one spike would lift a mean for the whole width of the window. At both ends the window holds what
    is there, at least half of it; one that shrinks to a single value would end in noise.
    """
    if len(values) < 40:
        return list(values), 1
    half = max(2, len(values) // 100)
    return [median(values[max(0, i - half): i + half + 1]) for i in range(len(values))], 2 * half + 1


def percentile(histogram: Sequence[tuple[int, int, int]], share: float) -> float:
    """The length that `share` of the rows do not exceed, taking rows as evenly spread within their bin."""
    wanted = share * sum(count for _, _, count in histogram)
    seen = 0
    for low, high, count in histogram:
        if count and seen + count >= wanted:
            return low + (high - low) * (wanted - seen) / count
        seen += count
    return float(histogram[-1][1])


def _robust(values: Iterable[float]) -> list[float]:
    """Values without lone spikes, for the range of an axis: at most three times the 98th percentile's height."""
    ordered = sorted(values)
    if len(ordered) < 50:
        return ordered
    limit = 3 * ordered[int(0.98 * len(ordered))]
    return [value for value in ordered if value <= limit] or ordered


# --- axes -------------------------------------------------------------------------------------------------------------


def _line_and_median(axes: Axes, points: Sequence[_Point], name: str) -> None:
    """Every value, thin, and their running median over it; a short run is one line with dots."""
    steps, values = zip(*points)
    medians, window = smooth(values)
    if window > 1:
        few = len(values) <= 500
        axes.plot(steps, values, color=_BLUE, alpha=0.45 if few else 0.3, linewidth=1.0 if few else 0.6,
                  label=f"{name}each step")
        axes.plot(steps, medians, color=_BLUE, linewidth=2, label=f"{name}median of {window} steps")
    else:
        axes.plot(steps, values, color=_BLUE, linewidth=2, marker=_dots(values), markersize=5, label=f"{name}each step")


def _dots(values: Sequence[float]) -> str | None:
    return "o" if len(values) <= _MAX_DOTS else None


def _limits(axes: Axes, values: Sequence[float], floor: float) -> None:
    """A range with a little air around the values, not under `floor` unless the values are."""
    if not values:
        return
    low, high = min(values), max(values)
    air = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    axes.set_ylim(max(low - air, floor) if low >= floor else low - air, high + air)


def _tell_of_higher(axes: Axes, values: Sequence[float]) -> None:
    """Say so where spikes leave the picture."""
    higher = [value for value in values if value > axes.get_ylim()[1]]
    if higher:
        text = f"{len(higher):,} {'value is' if len(higher) == 1 else 'values are'} higher, up to {max(higher):.3g}"
        axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=11, color=_INK)


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step", fontsize=12, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    low, high = axes.get_xlim()
    if high - low < 1:  # one step: centred, with whole numbers beside it
        middle = round((low + high) / 2)
        axes.set_xlim(middle - 1, middle + 1)


def _perplexity_axis(axes: Axes) -> None:
    """The same range read as perplexity = exp(loss), on the right."""
    low, high = axes.get_ylim()
    smallest, largest = math.exp(min(low, 700)), math.exp(min(high, 700))
    candidates = _round_numbers(smallest, largest)
    if len(candidates) > 9:
        candidates = candidates[:: math.ceil(len(candidates) / 9)]
    right = axes.twinx()
    right.set_ylim(low, high)
    right.set_yticks([math.log(value) for value in candidates], _labels(candidates))
    right.set_ylabel("perplexity", fontsize=12, color=_INK)
    right.tick_params(labelsize=11, colors=_INK, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)


def _round_numbers(low: float, high: float) -> list[float]:
    """Numbers a person would write on an axis from `low` to `high`, which are multiples apart or close together."""
    if high > 6 * low:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    else:
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
        first = math.ceil(low / step)
        numbers = [round(step * (first + i), 10) for i in range(8)]
    return [number for number in numbers if low <= number <= high]


def _labels(numbers: Sequence[float]) -> list[str]:
    """Close numbers with as many places as the finest of them needs; others each in its shortest form."""
    if numbers and numbers[-1] <= 6 * numbers[0]:
        places = max(len(f"{number:.10g}".partition(".")[2]) for number in numbers)
        return [f"{number:,.{places}f}" for number in numbers]
    return [
        f"{number:g}" if number < 10_000 else f"{number:.0e}" if number >= 1e12 else format_count(number)
        for number in numbers
    ]


def _mark_not_finite(axes: Axes, steps: Sequence[int]) -> None:
    """Crosses along the top for steps whose value is no number; their place says when, not how much."""
    if not steps:
        return
    label = f"not a finite number ({len(steps):,} step{'s' if len(steps) > 1 else ''})"
    axes.plot(steps, [0.97] * len(steps), linestyle="none", marker="x", markersize=8, markeredgewidth=2, color=_INK,
              transform=axes.get_xaxis_transform(), clip_on=False, label=label)
