"""What a push sends, and what has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.results.facts import printable
from qlora.units import KIB, format_bytes

if TYPE_CHECKING:
    from qlora.hub.destination import Target
    from qlora.hub.parcel import Parcel
    from qlora.hub.push import Pushed


def parcel_view(parcel: Parcel, target: Target) -> RenderableType:
    """Every file with its size, and where it would go. The card is printed after it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(f"To {target.repo}" + ("" if target.revision == "main" else f", branch {target.revision}"), overflow="fold")
    table.add_column("size", justify="right")
    for item in parcel.items:
        table.add_row(Text(printable(item.path)), _size(item.size_bytes))
    table.add_section()
    table.add_row(f"{len(parcel.items)} files", _size(parcel.size_bytes), style="bold")
    seen = "only you, or your organisation, can see it" if target.private else "everybody can see it"
    lines = [f"A new repository is {'private' if target.private else 'public'}: {seen}."]
    if target.tag:
        lines.append(f"Tagged {target.tag}.")
    if parcel.left_out:
        lines.append(f"Not sent: {', '.join(map(printable, parcel.left_out))}.")
    if parcel.card_by_hand:
        lines.append(f"The model card is {parcel.run / 'README.md'}, as it was edited.")
    return Group(table, *(Text(line) for line in lines), Text("Nothing has been sent. The model card:\n", style="bold"))


def pushed_lines(pushed: Pushed) -> list[str]:
    """The address, and in one line how to load what is there."""
    done = f"Pushed to {pushed.url}" if pushed.sent else f"Everything is there already: {pushed.url}"
    load = f'Load it: PeftModel.from_pretrained(base, "{pushed.repo}"), or talk to it: qlora chat {pushed.repo}'
    return [*pushed.notes, done, load]


def _size(size_bytes: int) -> str:
    return f"{size_bytes:,} B" if size_bytes < KIB else format_bytes(size_bytes)
