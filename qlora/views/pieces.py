"""What all views are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora.redact import redact


def make_table(*columns: str, gap: int = 2, right: Iterable[str] = ()) -> Table:
    """A table without lines. Columns named in `right` hold numbers; without any title there is no head."""
    made = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, show_header=any(columns))
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if column in tuple(right) else "left")
    return made


def heading(text: str) -> Text:
    """The first line of a block."""
    return Text(text, style="bold")


def shown(value: Any) -> str:
    """A setting's value, as short as it can be read."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else redact(str(value))
