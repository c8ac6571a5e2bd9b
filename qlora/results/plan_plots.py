"""Pictures of plans: what the memory consists of, card beside card, and planned beside measured.

Colours are Okabe and Ito's, as in `qlora.results.plots`, with hatches where one colour stands for two parts: weights that
are frozen are blue, what is trained is green, what a step needs is orange to red, what no setting changes is grey.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora.errors import OutputError
from qlora.results.plots import _BLUE, _GREY, _INK, _ORANGE, _draw
from qlora.units import GIB, KIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patheffects import AbstractPathEffect

    from qlora.planning.plan import Plan

PART_COLORS = {
    "base": "#0072B2", "embeddings": "#56B4E9", "head": "#9FD3F2", "adapters": "#009E73", "gradients": "#66C5AB",
    "optimizer": "#00593F", "activations": "#E69F00", "loss": "#F0E442", "workspace": "#D55E00", "context": "#A0A0A0",
    "margin": "#DDDDDD",
}
# Neighbours in the stack that a print in grey could not tell apart.
_HATCHES = {"head": "///", "gradients": "\\\\\\", "loss": "...", "margin": "xxx"}
_SUFFIX = ".png"
_PEAK, _OTHER_PHASE = "#5A5A5A", "#BFBFBF"
# Characters of the title, and of all names beneath the bars together, that the width of a picture holds.
_TITLE_WIDTH, _NAMES_WIDTH = 62, 72
# Up to so many names stand level under their bars, in lines; more are written at a slant.
_MAX_LEVEL_NAMES = 9


def check_picture(path: Path) -> None:
    """Find out before any work whether a picture can be written there.

    Raises:
        OutputError: another ending than .png, a folder that is not there, or a folder in its place.
    """
    if path.suffix.lower() != _SUFFIX:
        raise OutputError(f"{path} does not end in {_SUFFIX}, and PNG is what is drawn.",
                          f"Write {path.with_suffix(_SUFFIX)}.")
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent} for {path.name}.", "Make it first, or name another.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", f"Name a file in it: {path / f'plan{_SUFFIX}'}.")


def draw_plan(plan: Plan, path: Path) -> Path:
    """One plan: its parts stacked against the budget, and beside them the tensor memory of every phase.

    Raises:
        OutputError: the file cannot be written.
    """
    names = ["by part", *plan.phases]
    unit_bytes, unit = _unit([plan.peak_bytes, plan.budget_bytes, *plan.phases.values()])

    def fill(axes: Axes) -> bool:
        _stack(axes, 0, plan.parts, unit_bytes, set())
        for place, (phase, size_bytes) in enumerate(plan.phases.items(), 1):
            axes.bar(place, size_bytes / unit_bytes, width=0.62, color=_PEAK if phase == plan.peak_phase else _OTHER_PHASE)
        axes.axvline(0.5, color="#BFBFBF", linewidth=1)
        _budget(axes, plan.budget_bytes, unit_bytes)
        _totals(axes, [plan.peak_bytes, *plan.phases.values()], unit_bytes)
        _frame(axes, names, unit, [plan.peak_bytes, plan.budget_bytes, *plan.phases.values()], unit_bytes)
        return True

    verdict = "fits" if plan.fits else "does not fit"
    return _written(path, f"{_short(plan.model)} on {_short(plan.device)}: {verdict}", fill)


def draw_compare(plans: Sequence[Plan], path: Path) -> Path:
    """Plans side by side, one stack a card, each with a line at its own budget.

    Raises:
        OutputError: the file cannot be written, or there is no plan to draw.
    """
    if not plans:
        raise OutputError("There is no plan to draw.", "Name at least one card: --compare 4,8,12.")
    sizes = [size for plan in plans for size in (plan.peak_bytes, plan.budget_bytes)]
    unit_bytes, unit = _unit(sizes)

    def fill(axes: Axes) -> bool:
        named: set[str] = set()
        for place, plan in enumerate(plans):
            _stack(axes, place, plan.parts, unit_bytes, named)
            axes.hlines(plan.budget_bytes / unit_bytes, place - 0.44, place + 0.44, color=_INK, linewidth=2.5,
                        path_effects=_outlined(), label="budget" if place == 0 else None)
        _totals(axes, [plan.peak_bytes for plan in plans], unit_bytes, ["" if plan.fits else "too big: " for plan in plans])
        _frame(axes, [plan.device for plan in plans], unit, sizes, unit_bytes)
        return True

    models = list(dict.fromkeys(_short(plan.model) for plan in plans))
    return _written(path, f"{models[0] if len(models) == 1 else f'{len(models)} models'}: memory by card", fill)


def draw_planned_measured(
    planned: Mapping[str, int], measured: Mapping[str, int], budget_bytes: int, path: Path
) -> Path:
    """Tensor memory at its highest in every phase: what was planned, beside what was measured.

    A phase that only one of the two knows has one bar.

    Raises:
        OutputError: the file cannot be written.
    """
    phases = list(dict.fromkeys([*planned, *measured]))
    sizes = [budget_bytes, *planned.values(), *measured.values()]
    unit_bytes, unit = _unit(sizes)

    def fill(axes: Axes) -> bool:
        for shift, found, name, color, hatch in (
            (-0.2, planned, "planned", _ORANGE, "///"), (0.2, measured, "measured", _BLUE, None),
        ):
            places = [phases.index(phase) + shift for phase in found]
            bars = axes.bar(places, [size / unit_bytes for size in found.values()], width=0.38, color=color, hatch=hatch,
                            edgecolor="white", label=name)
            axes.bar_label(bars, [_figure(size / unit_bytes) for size in found.values()], fontsize=9, color=_INK, padding=2)
        _budget(axes, budget_bytes, unit_bytes)
        _frame(axes, phases, unit, sizes, unit_bytes)
        return True

    return _written(path, "Memory by phase, planned and measured", fill)


# --- what the pictures share ------------------------------------------------------------------------------------------


def _stack(axes: Axes, place: float, parts: Mapping[str, int], unit_bytes: int, named: set[str]) -> None:
    """One bar of parts. A part is named in the legend where it first takes any room; `named` keeps count."""
    bottom = 0.0
    for part, size_bytes in parts.items():
        if not size_bytes:
            continue
        height = size_bytes / unit_bytes
        axes.bar(place, height, bottom=bottom, width=0.62, color=PART_COLORS.get(part, _GREY), hatch=_HATCHES.get(part),
                 edgecolor="white", linewidth=0.4, label=None if part in named else part)
        named.add(part)
        bottom += height


def _budget(axes: Axes, budget_bytes: int, unit_bytes: int) -> None:
    """A line across all bars."""
    axes.axhline(budget_bytes / unit_bytes, color=_INK, linewidth=2, linestyle=(0, (4, 2)), path_effects=_outlined(),
                 label=f"budget {format_bytes(budget_bytes)}")


def _outlined() -> list[AbstractPathEffect]:
    """A white edge, so that a dark line shows on dark bars."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=4.5, foreground="white")]


def _totals(axes: Axes, sizes: Sequence[int], unit_bytes: int, words: Sequence[str] | None = None) -> None:
    """The height of each bar in figures above it."""
    for place, size_bytes in enumerate(sizes):
        text = f"{words[place] if words else ''}{_figure(size_bytes / unit_bytes)}"
        axes.annotate(text, (place, size_bytes / unit_bytes), xytext=(0, 3), textcoords="offset points", ha="center",
                      va="bottom", fontsize=10, color=_INK,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})


def _frame(axes: Axes, names: Sequence[str], unit: str, sizes: Sequence[int], unit_bytes: int) -> None:
    level = len(names) <= _MAX_LEVEL_NAMES
    each = _NAMES_WIDTH // max(1, min(len(names), _MAX_LEVEL_NAMES))
    shown = [textwrap.fill(name, each) if level else textwrap.shorten(name, 24, placeholder="…") for name in names]
    axes.set_xticks(range(len(names)), shown, **({} if level else {"rotation": 30, "ha": "right"}))
    axes.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axes.set_ylim(0, max(1.12 * max(sizes, default=0) / unit_bytes, 1e-9))
    axes.set_ylabel(unit, fontsize=12, color=_INK)
    axes.grid(False, axis="x")


def _unit(sizes: Sequence[int]) -> tuple[int, str]:
    """The unit in which the largest size has a whole number."""
    largest = max(sizes, default=0)
    return (GIB, "GiB") if largest >= GIB else (MIB, "MiB") if largest >= MIB else (KIB, "KiB")


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _short(name: str) -> str:
    """A Hub id, or the last folder of a path."""
    return Path(name).name if Path(name).is_absolute() else name


def _written(path: Path, title: str, fill: Callable[[Axes], bool]) -> Path:
    try:
        _draw(path, textwrap.fill(title, _TITLE_WIDTH), fill)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.", "Name a place you may write to.") from error
    return path
