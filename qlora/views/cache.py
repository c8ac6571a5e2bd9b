"""What `qlora cache` shows of the bases that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.engine.shelf import Cleared, Shelved
from qlora.units import format_bytes, format_count
from qlora.views.pieces import heading, make_table


def cache_view(stores: Sequence[Shelved], folder: Path, total_bytes: int) -> RenderableType:
    """The list of bases.

    Args:
        total_bytes: of the whole cache, plans and the embedded base included.
    """
    kept = f"The whole cache, with plans and the embedded base, takes {format_bytes(total_bytes)}."
    if not stores:
        return Group(heading(f"No quantised bases are kept in {folder}"), Text(kept))
    table = make_table("base", "parameters", "size", "used last", "name", right=("parameters", "size"))
    for store in stores:
        used = f"{datetime.fromtimestamp(store.used):%Y-%m-%d %H:%M}"
        count = format_count(store.num_parameters) if store.num_parameters else "-"
        table.add_row(store.base, count, format_bytes(store.size_bytes), used, store.name, style="dim" if store.state else "")
    notes = [Text(f"· {store.name}: {store.state}; the run that needs it next sees to that", style="yellow")
             for store in stores if store.state]
    size = format_bytes(sum(store.size_bytes for store in stores))
    return Group(heading(f"Quantised bases in {folder}"), table, *notes, Text(f"{len(stores)} of them, {size}. {kept}"),
                 Text("`qlora cache clear NAME` removes one; the run that needs it next makes it again."))


def cleared_view(cleared: Cleared) -> RenderableType:
    """What was removed."""
    lines = [f"Removed {name}" for name in cleared.removed]
    lines += [f"Left alone, as a run is using it: {name}" for name in cleared.in_use]
    return Text("\n".join([*lines, f"Freed {format_bytes(cleared.freed_bytes)}."]))
