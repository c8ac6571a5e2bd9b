"""What `qlora check` shows of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.views.pieces import heading, make_table

if TYPE_CHECKING:
    from qlora.training.preflight import Check


def preflight_view(checks: Sequence[Check]) -> RenderableType:
    """One row a check, with what is needed and what is there; below, what helps where they do not agree."""
    table = make_table("check", "ok", "needed", "found")
    for check in checks:
        table.add_row(Text(check.name), _mark(check), Text(check.needed), Text(check.there))
    fixes = [Text(f"{check.name}: {check.fix}", style=_style(check)) for check in checks if not check.ok]
    return Group(heading("This machine"), table, *fixes)


def _mark(check: Check) -> Text:
    return Text("yes", style="green") if check.ok else Text("no", style=_style(check))


def _style(check: Check) -> str:
    return "red" if check.stops else "yellow"
