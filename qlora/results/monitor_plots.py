"""The plots of what the monitor saw: gradient norms, and adapters against what they adapt, by group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.results.plots import _BLUE, _GREEN, _GREY, _INK, _MAX_DOTS, _ORANGE, _RED, _draw, _step_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A colour for each third of the layers, dashes for a kind.
_COLORS = (_BLUE, _ORANGE, _RED)
_SOLID, _DASHED, _DOTTED = "solid", (0, (4, 2)), (0, (1, 1))


def draw_monitor(metrics: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what the looks in rows of metrics.jsonl found; return the files written into `folder`; none where nobody looked."""
    looks = [(int(row["step"]), row["monitor"]) for row in metrics if row.get("monitor")]
    if not looks:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "gradients.png": ("Gradient norm by group of layers", lambda axes: _gradients(axes, looks)),
        "adapters.png": ("Adapters against what they adapt", lambda axes: _adapters(axes, looks)),
    }
    return [folder / name for name, (title, fill) in drawn.items() if _draw(folder / name, title, fill)]


def _gradients(axes: Axes, looks: Sequence[tuple[int, Mapping[str, Any]]]) -> bool:
    for name, color, dashes in _styles(looks):
        both = {step: (found[name]["grad_a"] ** 2 + found[name]["grad_b"] ** 2) ** 0.5
                for step, found in looks if {"grad_a", "grad_b"} <= found.get(name, {}).keys()}
        _line(axes, both, name, color, dashes)
    return _finish(axes, "L2 norm of dL/dA and dL/dB, before clipping")


def _adapters(axes: Axes, looks: Sequence[tuple[int, Mapping[str, Any]]]) -> bool:
    """Thick lines for what reaches activations, thin ones for weights."""
    for name, color, dashes in _styles(looks):
        for key, width, label in (("path_ratio", 2.2, name), ("update_ratio", 0.9, None)):
            points = {step: found[name][key] for step, found in looks if key in found.get(name, {})}
            _line(axes, points, label, color, dashes, width)
    return _finish(axes, "thick: LoRA path / base path\nthin: update / weights")


def _styles(looks: Sequence[tuple[int, Mapping[str, Any]]]) -> list[tuple[str, str, Any]]:
    """(group, colour, dashes) of every group, in their order."""
    names = list(dict.fromkeys(name for _, found in looks for name in found))
    seen: dict[str, int] = {}
    styles = []
    for name in names:
        kind = name.partition(" ")[0]
        place = seen[kind] = seen.get(kind, -1) + 1
        dashes = {"attention": _SOLID, "mlp": _DASHED}.get(kind, _DOTTED)
        color = _GREEN if kind == "other" else _COLORS[place] if place < len(_COLORS) else _GREY
        styles.append((name, color, dashes))
    return styles


def _line(axes: Axes, points: Mapping[int, float], label: str | None, color: str, dashes: Any, width: float = 1.8) -> None:
    """On a scale of powers of ten nothing that is 0 can be drawn; such a point is left out."""
    points = {step: value for step, value in points.items() if value > 0}
    if points:
        axes.plot(list(points), list(points.values()), color=color, linestyle=dashes, linewidth=width, label=label,
                  marker="o" if len(points) <= _MAX_DOTS else None, markersize=2 + 1.2 * width)


def _finish(axes: Axes, what: str) -> bool:
    if not axes.lines:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    _step_axis(axes)
    axes.set_ylabel(what, fontsize=12, color=_INK)
    return True
