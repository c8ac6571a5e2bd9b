"""What `qlora check` shows of the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.units import spread
from qlora.views.pieces import heading, make_table

if TYPE_CHECKING:
    from qlora.data import PreparedData

_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_BAR_WIDTH = 40


def data_view(data: PreparedData) -> RenderableType:
    """What `qlora check` prints of the data: counts, lengths, findings, and three rows with the trained tokens marked."""
    num_rows = len(data.train_rows) + len(data.validation_rows)
    counts = make_table("", "")
    for label, value in (
        ("to train on", f"{len(data.train) if data.tokenizer else len(data.train_rows):,}"),
        ("held out", f"{len(data.validation) if data.tokenizer else len(data.validation_rows):,}"),
        ("duplicates", f"{data.rowset.num_duplicates:,}"),
        ("bad rows skipped", f"{len(data.bad_rows):,}"),
        ("cut at the end", f"{data.fit.num_truncated:,}"),
        ("dropped: answer cut away", f"{data.fit.num_answer_lost:,}"),
        ("dropped: nothing to train on", f"{data.fit.num_fully_masked:,}"),
    ):
        counts.add_row(label, value)
    title = heading(f"Data: {num_rows:,} rows, format {data.rowset.format}")
    parts: list[RenderableType] = [title, counts, lengths_view(data), findings_view(data)]
    if data.train:
        parts.append(Text("\nThree rows as the model reads them. Green is trained; the rest is only read.", style="bold"))
        parts += [_row_view(data, i) for i in spread(len(data.train), 3)]
    return Group(*parts)


def lengths_view(data: PreparedData) -> RenderableType:
    """Histogram of row lengths, with the percentiles that decide on memory."""
    lengths, unit = data.lengths, data.length_unit
    title = (f"Length in {unit}: p50 {lengths.p50:,.0f}, p95 {lengths.p95:,.0f}, p99 {lengths.p99:,.0f}, longest {lengths.max:,.0f}"
             + (f"; cut at {data.max_length:,}" if data.max_length and unit == "tokens" else ""))
    table = make_table("from", "to", "rows", "", right=("from", "to", "rows"))
    most = max((count for _, _, count in lengths.histogram), default=1) or 1
    for low, high, count in lengths.histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", Text(bar, style="cyan"))
    return Group(heading(title), table)


def findings_view(data: PreparedData) -> RenderableType:
    """Errors, warnings and notes, worst first, each with what helps."""
    order = {level: rank for rank, level in enumerate(_LEVEL_STYLES)}
    lines = []
    for finding in sorted(data.findings, key=lambda f: order[f.level]):
        line = Text(f"{finding.level}: ", style=_LEVEL_STYLES[finding.level]).append(finding.text, style="default")
        lines.append(line.append(f" {finding.fix}", style="dim") if finding.fix else line)
    return Group(*lines)


def _row_view(data: PreparedData, index: int) -> Text:
    text = Text(f"\n{data.train[index].row.file}:{data.train[index].row.line}\n", style="dim")
    for piece, trained in data.pieces(index):
        # Special tokens and line ends are part of what is trained, so they are shown.
        text.append(piece.replace("\n", "⏎\n"), style="green" if trained else "default")
    return text
