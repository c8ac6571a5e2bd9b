"""What `qlora measure` shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.measuring.summary import CELL_TITLES, PLAN_TITLES, cell_row, plan_row, summaries, summary_rows
from qlora.redact import redact
from qlora.views.pieces import make_table

# Of a row's texts these make up what a cell is, in its first and its second line; the others have columns of their own.
_FIRST, _SECOND = ("model", "budget"), ("rows", "tokens", "r", "how")


def measured_view(lines: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A row a cell, then a column of figures for each device."""
    return Group(_table(CELL_TITLES, cell_row, lines), Text(""), summary_view(lines))


def summary_view(lines: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Mean, median and worst error, under-estimates and refusals, one column a device."""
    found = summaries(lines)
    columns = [summary_rows(each) for each in found]
    table = make_table("planned against measured", *(_plain(each.device).plain for each in found))
    for name in columns[0] if columns else ():
        if any(column[name] not in ("", "-", "-, -") for column in columns):
            table.add_row(name, *(_plain(column[name]) for column in columns))
    return table


def plans_view(lines: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What is planned for each cell; nothing was trained."""
    num_fit = sum(bool(line.get("fits")) for line in lines)
    end = Text(f"{num_fit} of {len(lines)} fit. Nothing was trained: leave --plan-only out for that.", style="dim")
    return Group(_table(PLAN_TITLES, plan_row, lines), Text(""), end)


def _table(
    titles: Sequence[str], row_of: Callable[[Mapping[str, Any]], Sequence[str]], lines: Sequence[Mapping[str, Any]]
) -> RenderableType:
    """The cell, what it is in a second line, and its figures; columns that hold nothing are left out."""
    rows = [dict(zip(titles, row_of(line))) for line in lines]
    figures = [title for title in titles if title not in (*_FIRST, *_SECOND) and any(row[title] for row in rows)]
    table = make_table("cell", *figures, right=("planned", "measured", "reserved", "tok/s"))
    for row in rows:
        cell = _plain(", ".join(filter(None, (row[title] for title in _FIRST))))
        if row["rows"]:
            what = f"{row['rows']} rows of {row['tokens']}, r {row['r']}, {row['how']}"
            cell.append(f"\n  {redact(what)}", style="dim")
        table.add_row(cell, *(_plain(row[title]) for title in figures))
    return table


def _plain(text: str) -> Text:
    """Names may hold what a terminal's markup would take for its own."""
    return Text(redact(text))
