"""What `qlora sweep` shows."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.results.facts import num_of
from qlora.sweeping import table
from qlora.sweeping.preview import Preview
from qlora.sweeping.results import SweepResult
from qlora.units import format_bytes, format_count, format_seconds
from qlora.views.pieces import heading, make_table

_WIDE = 125


def sweep_view(result: SweepResult, width: int = 80) -> RenderableType:
    """The table of a finished sweep, what the figures are, and what to take.

    Args:
        width: of the terminal, in characters; columns that do not fit are in sweep.md alone.
    """
    wide = width >= _WIDE
    columns = table.head(result, wide=wide)
    made = make_table(*columns, right=columns[len(result.keys):])
    for row in table.rows(result, wide=wide):
        made.add_row(*row, style="bold" if "✓" in row else None)
    parts: list[RenderableType] = [heading(f"Sweep of {result.name}"), made, Text(table.before_line(result))]
    parts += [Text(line, style="dim") for line in table.about(result)]
    first, *reasons = table.winner_lines(result)
    return Group(*parts, Text(), Text(first, style="bold green"), *(Text(f"· {line}") for line in reasons))


def preview_view(found: Preview) -> RenderableType:
    """What would be tried."""
    figures = ("trained", "needs", "of", "training, one seed")
    made = make_table("planned", *figures[:3], "", figures[3], right=figures)
    for point in found.points:
        made.add_row(point.name, format_count(point.parameters), format_bytes(point.peak_bytes), format_bytes(point.budget_bytes),
                     "fits" if point.fits else "does not fit", format_seconds(point.seconds) if point.seconds is not None else "")
    exact = found.search == "grid"
    lines = [f"{'' if exact else 'Up to '}{num_of(found.num_points, 'combination')}, each with "
             f"{num_of(found.num_seeds, 'seed')}: {num_of(found.num_points * found.num_seeds, 'run')}."]
    if found.seconds is not None:
        lines.append(f"About {format_seconds(found.seconds)} of training at most, by estimate; loading and evaluating come on "
                     "top.")
    if found.search == "guided":
        lines.append("Ranks are doubled as long as that pays; alpha and targets are then tried at the rank that was found. Planned "
                     "here is the highest one.")
    elif found.search == "tpe":
        lines.append("Planned here is the combination with the highest values.")
    return Group(heading("What this sweep would try"), made, *(Text(line) for line in lines))
