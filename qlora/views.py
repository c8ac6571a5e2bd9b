"""What the verbs show: tables and text for a terminal, made from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.units import format_bytes, format_count, spread

if TYPE_CHECKING:
    from qlora.data import PreparedData
    from qlora.planning.plan import Plan

_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_BAR_WIDTH = 40


def plan_view(plan: Plan) -> RenderableType:
    """Every value that was decided, with the reason, then those that were given. Plain defaults are in resolved.json."""
    table = _table("setting", "value", "because")
    table.columns[0].no_wrap = True
    given = []
    for key, decision in plan.decisions.items():
        if decision.source == "given":
            given.append(f"{key}={_shown(decision.value)}")
        elif decision.source != "default":
            table.add_row(key, Text(_shown(decision.value), style="bold"), Text(decision.reason, style="dim"))
    least = (f"Weights, gradients and optimizer state take {format_bytes(plan.least_bytes)} of {format_bytes(plan.budget_bytes)} "
             f"on {plan.device}; activations come on top. The run takes {plan.num_steps:,} optimizer step"
             f"{'' if plan.num_steps == 1 else 's'}.")
    return Group(_title(f"Plan for {plan.model}"), table, Text("Given: " + "  ".join(given), style="dim"), Text(least))


def inspection_view(found: Mapping[str, Any]) -> RenderableType:
    """What `qlora inspect` prints; `found` is `qlora.architecture.inspection`."""
    r = found["r"]
    published = found["published_parameters"]
    differs = f" (published: {published:,})" if published not in (None, found["num_parameters"]) else ""
    four, sixteen = found["four_bit"], found["sixteen_bit"]
    head = _table("", "")
    head.add_row("parameters", f"{found['num_parameters']:,}{differs}")
    head.add_row("in 4 bits", f"{four['parameters']:,} in {four['modules']} modules, {format_bytes(four['bytes'])} with their scales")
    head.add_row("in 16 bits", f"{sixteen['parameters']:,}, {format_bytes(sixteen['bytes'])} (embeddings "
                               f"{format_count(sixteen['embeddings'])}{', tied to the head' if found['tied_embeddings'] else ''})")
    head.add_row("longest context", f"{found['max_positions']:,} tokens" if found["max_positions"] else "no limit in the config")
    table = _table("projection", "kind", "in -> out", "count", f"LoRA parameters at r={r}")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in found["projections"]:
        style = "" if row["hit"] else "dim"
        shape = f"{row['in_features']:,} -> {row['out_features']:,}"
        table.add_row(row["place"], row["kind"], shape, str(row["count"]),
                      f"{row['lora_parameters']:,}" if row["hit"] else "-", style=style)
    table.add_section()
    table.add_row("total", "", "", str(found["num_targets"]), f"{found['lora_parameters']:,}", style="bold")
    share = Text(f"{found['lora_parameters']:,} trainable parameters, {found['percent_trainable']:.2f} % of the model. "
                 f"PEFT's target_modules: {', '.join(found['patterns'])}")
    title = _title(f"{found['model']}: {found['model_type']}, {found['num_layers']} layers")
    return Group(title, head, table, share, *(Text(f"· {note}", style="yellow") for note in found["notes"]))


def data_view(data: PreparedData) -> RenderableType:
    """What `qlora check` prints of the data: counts, lengths, findings, and three rows with the trained tokens marked."""
    num_rows = len(data.train_rows) + len(data.validation_rows)
    counts = _table("", "")
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
    title = _title(f"Data: {num_rows:,} rows, format {data.rowset.format}")
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
    table = _table("from", "to", "rows", "")
    table.columns[0].justify = table.columns[1].justify = table.columns[2].justify = "right"
    most = max((count for _, _, count in lengths.histogram), default=1) or 1
    for low, high, count in lengths.histogram:
        bar = "█" * round(_BAR_WIDTH * count / most) or ("▏" if count else "")
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", Text(bar, style="cyan"))
    return Group(_title(title), table)


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


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
