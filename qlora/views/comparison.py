"""What `qlora eval` shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qlora.comparing import Comparison
from qlora.results.facts import num_of, printable
from qlora.views.pieces import heading, make_table


def comparison_view(found: Comparison) -> RenderableType:
    """A column for each candidate, and a mark where an adapter is better than the base."""
    evaluations = [each.evaluation for each in found.candidates]
    names = [printable(each.name) for each in found.candidates]
    rows = "held-out row" if found.held_out else "row"
    table = make_table(f"On {num_of(found.num_rows, rows)}", *names, " ", right=names)
    table.add_row("loss", *_shown([each.loss for each in evaluations], "{:.4f}", lower=True))
    table.add_row("perplexity", *_shown([each.perplexity for each in evaluations], "{:,.2f}", lower=True))
    if all(each.exact_match is not None for each in evaluations):
        shares = [100 * each.exact_match for each in evaluations]
        table.add_row("exact match", *_shown(shares, "{:.1f} %", lower=False))
    parts = [heading(f"{printable(found.adapter.name)} beside its base, {printable(found.adapter.base)}"), table]
    if evaluations[0].num_answers:
        parts.append(Text(f"Exact match is of {num_of(evaluations[0].num_answers, 'answer')}.", style="dim"))
    return Group(*parts)


def _shown(values: Sequence[float], style: str, *, lower: bool) -> list[str]:
    """The figures, and what the last says beside the first."""
    texts = [style.format(value) for value in values]
    if texts[0] == texts[-1]:
        return [*texts, "= same"]
    better = (values[-1] < values[0]) == lower and math.isfinite(values[-1])
    return [*texts, "✓ better" if better else "✗ worse"]
