"""The table of a sweep as texts: one for the terminal and for sweep.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from qlora.results.facts import num_of
from qlora.sweeping.results import Point, SweepResult, summary_of
from qlora.units import format_bytes, format_count, format_seconds

_COLUMNS = ("trained", "planned", "memory", "time", "loss", "perplexity", "exact match", "to the winner")
_ONLY_WIDE = {"planned", "perplexity", "exact match"}


def head(result: SweepResult, *, wide: bool = True) -> list[str]:
    """Names of the columns: the settings that are searched, then what was found. Those of a narrow table fit 80 characters."""
    hidden = set() if wide else set(_ONLY_WIDE)
    if not any(summary_of(point).get("match_after") is not None for point in result.points):
        hidden.add("exact match")
    if result.winner is None or len(result.points) == 1:
        hidden.add("to the winner")
    return [*(key.partition(".")[2] for key in result.keys), *(column for column in _COLUMNS if column not in hidden)]


def rows(result: SweepResult, *, wide: bool = True) -> list[list[str]]:
    """A row for each point, as long as the head; of one without a result its problem stands where the figures would be."""
    columns = head(result, wide=wide)
    return [_row(point, result, columns, places=4 if wide else 3) for point in result.points]


def before_line(result: SweepResult) -> str:
    """How good the base was, which all points begin with; "" where nothing was measured."""
    good = [summary_of(point) for point in result.points if point.good]
    if not good:
        return ""
    first = good[0]
    match = f", exact match {_percent(first['match_before'])}" if first["match_before"] is not None else ""
    return f"Before training: loss {first['loss_before']:.4f}, perplexity {_perplexity(first['loss_before'])}{match}."


def about(result: SweepResult) -> list[str]:
    """What the figures are, in sentences."""
    data, several = result.facts["data"], len(result.seeds) > 1
    lines = [f"Loss is nats a token on {num_of(data['num_held_out'], 'held-out row')}, after training on "
             f"{num_of(data['num_train'], 'row')}; perplexity is exp of it."]
    if several:
        lines.append(f"Means over {len(result.seeds)} seeds, ± the standard deviation. A seed also draws the rows that are held "
                     "out (unless those are a file of their own), so rows of the table are compared seed by seed: the last column "
                     "is the mean difference, ± two of its standard errors.")
    else:
        lines.append("One seed shows no spread: differences may be chance. --seeds 3 measures it.")
    if "lora.alpha" in result.keys and "train.learning_rate" not in result.keys:
        rates = {run.learning_rate for point in result.points for run in point.runs}
        if len(rates) > 1:
            lines.append("train.learning_rate is auto and falls as alpha / r rises, so that their product stays; give it to "
                         "compare alphas at one rate.")
    return [*lines, "Memory is of tensors at their highest; time is of one run, all phases."]


def winner_lines(result: SweepResult) -> list[str]:
    """What to take, why, and the command that trains it."""
    if result.winner is None:
        return []
    lines = [f"Take {' '.join(f'{key}={value}' for key, value in result.winner.settings.items())}"]
    lines += result.choice.reasons if result.choice else ()
    return lines


def _row(point: Point, result: SweepResult, columns: Sequence[str], places: int) -> list[str]:
    values = [_value(point.settings.get(key)) for key in result.keys]
    if not point.good:
        return [*values, point.problem, *[""] * (len(columns) - len(values) - 1)]
    row = summary_of(point)
    spread = f" ± {row['loss_spread']:.{places}f}" if len(point.runs) > 1 else ""
    cells = {
        "trained": format_count(row["parameters"]), "planned": format_bytes(row["planned_bytes"]),
        "memory": format_bytes(row["measured_bytes"]),
        "time": format_seconds(row["seconds"]), "loss": f"{row['loss_after']:.{places}f}{spread}",
        "perplexity": _perplexity(row["loss_after"]),
        "exact match": "" if row["match_after"] is None else _percent(row["match_after"]),
        "to the winner": _difference(point, result.winner, places),
    }
    return [*values, *(cells[column] for column in columns[len(values):])]


def _difference(point: Point, winner: Point | None, places: int) -> str:
    if winner is None or point is winner or point.name == winner.name:
        return "✓"
    found = [mine - best for mine, best in zip(point.losses, winner.losses, strict=True)]
    noise = f" ± {2 * statistics.stdev(found) / math.sqrt(len(found)):.{places}f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):+.{places}f}{noise}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _perplexity(loss: float) -> str:
    if loss >= 700:
        return "inf"
    return f"{math.exp(loss):,.2f}" if loss < 12 else f"{math.exp(loss):.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
