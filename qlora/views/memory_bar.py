"""A bar that shows what the memory of a plan is made of, against its budget, and its legend. Both read the same with
and without colours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from qlora.results.plan_plots import PART_COLORS
from qlora.units import format_bytes
from qlora.views.pieces import make_table

# What stands at the start of a part's stretch of the bar, and before its name in the legend.
LETTERS = {
    "base": "b", "embeddings": "e", "head": "h", "adapters": "a", "gradients": "g", "optimizer": "o", "activations": "v",
    "loss": "l", "workspace": "w", "context": "c", "margin": "m",
}
FREE = "."
_MAX_WIDTH = 100
_TWO_COLUMNS = 72  # columns of text that the legend needs to put two parts on a line


@dataclass(frozen=True)
class MemoryBar:
    """Parts side by side, each with its letter, then what is free. Where the parts overflow the budget, a mark stands at
    the budget and everything behind it is hatched.

    Args:
        parts: bytes by part, drawn in this order.
        budget_bytes: 0 draws the parts alone.
    """

    parts: Mapping[str, int]
    budget_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, over, free, mark = ("=", "x", FREE, "|") if options.ascii_only else ("█", "▒", FREE, "│")
        width = max(2, min(options.max_width, _MAX_WIDTH) - 1)  # the mark of the budget takes a column of its own
        budget_at, ends = scaled(self.parts, self.budget_bytes, width)
        bar, column = Text(no_wrap=True), 0
        for part, place in _columns(ends, width):
            if column == budget_at:
                bar.append(mark, style="bold")
            bar.append(*_cell(part, place, over if column >= budget_at else full, free))
            column += 1
        if budget_at == width:
            bar.append(mark, style="bold")
        yield bar
        yield self._scale(budget_at)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(20, min(options.max_width, _MAX_WIDTH))

    def _scale(self, budget_at: int) -> Text:
        """The line beneath the bar: the budget under its mark, and what is left of it or missing."""
        rest_bytes = self.budget_bytes - sum(self.parts.values())
        label = f"budget {format_bytes(self.budget_bytes)} ^"
        if rest_bytes >= 0:
            return Text(f"free {format_bytes(rest_bytes)}, {label}".rjust(budget_at + 1), no_wrap=True)
        missing = f"{format_bytes(-rest_bytes)} over"
        at_mark = label.rjust(budget_at + 1) if len(label) <= budget_at + 1 else f"{'^':>{budget_at + 1}} {label[:-2]}"
        return Text(f"{at_mark}  ", no_wrap=True).append(missing, style="bold red")


@dataclass(frozen=True)
class Legend:
    """What the letters of a `MemoryBar` stand for, with sizes and shares of the budget; two to a line where they fit."""

    parts: Mapping[str, int]
    budget_bytes: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [(LETTERS.get(part, "?"), part, size) for part, size in self.parts.items() if size]
        free_bytes = self.budget_bytes - sum(self.parts.values())
        cells += [(FREE, "free", free_bytes)] if free_bytes > 0 else []
        num_columns = 2 if options.max_width >= _TWO_COLUMNS else 1
        num_rows = -(-len(cells) // num_columns)
        table = make_table(*[""] * 4 * num_columns)
        for place, column in enumerate(table.columns):
            column.justify, column.no_wrap = "right" if place % 4 > 1 else "left", True
        for row in range(num_rows):
            words: list[str] = []
            for letter, name, size_bytes in cells[row::num_rows]:
                share = f"{100 * size_bytes / self.budget_bytes:.1f} %" if self.budget_bytes else ""
                words += [letter, name, format_bytes(size_bytes), share]
            table.add_row(*map(Text, words))
        yield table


def scaled(parts: Mapping[str, int], budget_bytes: int, width: int) -> tuple[int, dict[str, int]]:
    """Where on `width` columns the budget stands, and the column after the last of each part.

    The larger of budget and parts fills the width. Rounding never hides a verdict: what overflows has a column behind the
    budget, and what is free has one before it.
    """
    total_bytes = sum(parts.values())
    scale_bytes = max(budget_bytes, total_bytes, 1)
    budget_at = round(budget_bytes / scale_bytes * width)
    if total_bytes > budget_bytes:
        budget_at = min(budget_at, width - 1)
    limit = width - 1 if total_bytes < budget_bytes else width
    ends, seen_bytes = {}, 0
    for part, size_bytes in parts.items():
        seen_bytes += size_bytes
        ends[part] = min(round(seen_bytes / scale_bytes * width), limit)
    return budget_at, ends


def _columns(ends: Mapping[str, int], width: int) -> Iterator[tuple[str | None, int]]:
    """For each column the part that it shows, None for free, and its place within that part from 0."""
    start = 0
    for part, end in ends.items():
        yield from ((part, place) for place in range(end - start))
        start = end
    yield from ((None, place) for place in range(width - start))


def _cell(part: str | None, place: int, block: str, free: str) -> tuple[str, str]:
    if part is None:
        return free, "dim"
    color = PART_COLORS.get(part, "#8C8C8C")
    if place:
        return block, color
    return LETTERS.get(part, "?"), f"{_readable_on(color)} on {color}"


def _readable_on(color: str) -> str:
    """Black or white ink, whichever stands out; weights of the channels as in ITU-R BT.601."""
    red, green, blue = (int(color[i: i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "#FFFFFF"
