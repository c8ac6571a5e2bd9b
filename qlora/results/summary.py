"""The tables with which a run ends on a terminal. They are returned, not printed: the command line prints."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora.results.facts import RunSummary, Sample, num_of, outcome, printable, scores, verdict
from qlora.units import format_bytes, format_seconds

_COLORS = {"better": "green", "worse": "red", "same": "default"}
_MARKS = {"better": "✓ better", "worse": "✗ worse", "same": "= same"}
# About three lines of a narrow terminal; the report has the whole text.
_MAX_SAMPLE_CHARACTERS = 200


def summary_tables(summary: RunSummary) -> list[Table | Panel]:
    """Verdict, scores, sample answers and cost, in the order in which they should be printed."""
    parts: list[Table | Panel] = [_verdict(summary)]
    if scores(summary):
        parts.append(_scores(summary))
    if summary.samples:
        parts.append(_samples(summary.samples))
    parts.append(_cost(summary))
    return parts


def _verdict(summary: RunSummary) -> Panel:
    color = {"better": "green", "worse": "red", "broken": "red"}.get(outcome(summary), "yellow")
    return Panel(Text(verdict(summary)), border_style=color, box=box.ROUNDED, padding=(0, 1))


def _scores(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column(f"On {num_of(summary.data.num_validation, 'held-out row')}")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    table.add_column("")
    table.add_column("", style="dim")
    for score in scores(summary):
        mark = Text(_MARKS[score.outcome], style=_COLORS[score.outcome])
        table.add_row(score.measure, score.before, score.after, mark, score.good_direction)
    return table


def _samples(samples: Sequence[Sample]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, expand=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("Answers to held-out prompts", ratio=1, overflow="fold")
    for i, sample in enumerate(samples):
        texts = (("prompt", sample.prompt, ""), ("in the data", sample.reference, ""), ("before", sample.before, ""),
                 ("after", sample.after, "bold"))
        for name, text, style in texts:
            table.add_row(name, one_line(text, style), end_section=name == "after" and i + 1 < len(samples))
    return table


def one_line(text: str, style: str = "") -> Text:
    """Text from data or a model, safe for a terminal: no markup, no control characters, one paragraph, cut if long."""
    clean = printable(re.sub(r"\s+", " ", text).strip())
    if not clean:
        return Text("(empty)", style="dim")
    if len(clean) > _MAX_SAMPLE_CHARACTERS:
        clean = clean[: _MAX_SAMPLE_CHARACTERS - 1].rstrip() + "…"
    return Text(clean, style=style)


def _cost(summary: RunSummary) -> Table:
    training, model = summary.training, summary.model
    where = "RAM" if summary.device.kind == "cpu" else summary.device.name
    phases = ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in summary.seconds.items()
                       if seconds >= 0.05)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_header=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("", overflow="fold")
    rows = (
        ("peak memory", f"{format_bytes(summary.peak_bytes)} of {where}; budget {format_bytes(summary.budget_bytes)}"),
        ("trainable", f"{model.trainable_parameters:,} parameters, {100 * model.trainable_share:.2f} % of the base's"),
        ("time", f"{format_seconds(summary.total_seconds)} ({phases})"),
        ("speed", f"{training.tokens_per_second:,.0f} tokens/s over {num_of(training.num_steps, 'step')}"),
    )
    for name, text in rows:
        table.add_row(name, Text(text))
    return table
