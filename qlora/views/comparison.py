"""What `qlora eval` shows."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora.comparing import Candidate, Comparison
from qlora.comparing.figures import Difference, Figure
from qlora.results.facts import num_of, printable
from qlora.results.summary import one_line
from qlora.views.pieces import heading

_MARKS = {"better": ("✓ better", "green"), "worse": ("✗ worse", "red"), "no difference seen": ("? unclear", "dim")}
# By figure: what it is called, how it is written, and whose difference says which is better.
_ROWS: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
    ("loss", "loss", lambda value: f"{value:.4f}", "loss"),
    ("perplexity", "perplexity", lambda value: _short(value), "loss"),
    ("bits_per_byte", "bits/byte", lambda value: f"{value:.4f}", "bits_per_byte"),
    ("byte_perplexity", "perpl./byte", lambda value: _short(value), "bits_per_byte"),
    ("exact_match", "exact", lambda value: f"{100 * value:.1f} %", "exact_match"),
    ("normalised_match", "normalised", lambda value: f"{100 * value:.1f} %", "normalised_match"),
)
_SYMMETRIC = ("loss", "bits_per_byte")  # whose interval is as wide on both sides
_NAME_WIDTH = 12  # five columns of it stand in 80 characters beside the names of the figures


def comparison_view(found: Comparison, num_samples: int = 3) -> RenderableType:
    """A column for each candidate: figures with their intervals, and whether it differs from the base. Beneath, samples."""
    names = ", ".join(printable(name) for name in found.adapters)
    rows = num_of(found.num_rows, "held-out row" if found.held_out else "row")
    parts: list[RenderableType] = [heading(f"{names} beside {'its' if len(found.adapters) == 1 else 'their'} base, "
                                           f"{printable(found.adapter.base)}, on {rows}"), _figures(found), *_explained(found)]
    if found.samples and num_samples:
        parts += [Text(), _samples(found, num_samples)]
    return Group(*parts)


def _figures(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for each in found.candidates:
        table.add_column(_name(each.name, len(found.candidates)), justify="right", no_wrap=True)
    figures = [each.measured.figures for each in found.candidates]
    differences = [each.measured.beside(each.base) if each.base else {} for each in found.candidates]
    shown = [row for row in _ROWS if row[0] in figures[0]]
    for key, name, style, decides in shown:
        cells = [_cell(each[key], style, key in _SYMMETRIC, beside.get(decides))
                 for each, beside in zip(figures, differences, strict=True)]
        table.add_row(name, *cells, end_section=key != shown[-1][0])
    return table


def _cell(figure: Figure, style: Callable[[float], str], symmetric: bool, difference: Difference | None) -> Text:
    """The figure, its interval, and what can be said of it beside the base."""
    text = Text(style(figure.value), style="bold")
    if figure.interval is not None and symmetric:
        text.append(f"\n±{style(figure.interval.high - figure.value)}", style="not bold dim")
    elif figure.interval is not None:
        low, high = (style(value).removesuffix(" %") for value in (figure.interval.low, figure.interval.high))
        text.append(f"\n{low}–{high}", style="not bold dim")
    if difference is not None:
        mark, color = _MARKS[difference.outcome]
        text.append(f"\n{mark}", style=f"not bold {color}")
    return text


def _explained(found: Comparison) -> list[Text]:
    number = found.candidates[0].evaluation.num_answers
    lines = ["Loss is in nats a token; beneath each figure is its 95 % interval. Better or worse is said where the interval of "
             "the difference on the same rows leaves out 0; where it does not, no difference was seen."]
    if number:
        lines.append(f"Exact and normalised are the shares of {num_of(number, 'answer')} that match; normalised leaves case, "
                     "punctuation and articles out.")
    differences = [f"{printable(each.name)}: {_told(each)}" for each in found.candidates if each.base is not None]
    return [Text(line) for line in differences] + [Text(line, style="dim") for line in lines]


def _told(each: Candidate) -> str:
    """The differences from the base in words, with their intervals."""
    beside, parts = each.measured.beside(each.base), []
    for key, name, scale, style in (("loss", "loss", 1, "{:+.4f}"), ("exact_match", "exact match", 100, "{:+.1f} points"),
                                    ("normalised_match", "normalised match", 100, "{:+.1f} points")):
        if key in beside:
            difference, interval = beside[key], beside[key].interval
            part = f"{name} {style.format(scale * difference.value)}"
            if interval is not None:
                low, high = (style.format(scale * value) for value in (interval.low, interval.high))
                part += f" ({low.removesuffix(' points')} to {high})"
            parts.append(part)
    return ", ".join(parts) + " beside the base."


def _samples(found: Comparison, number: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, expand=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("Answers", ratio=1, overflow="fold")
    chosen = found.samples[:number]
    for i, sample in enumerate(chosen):
        rows = [("prompt", sample.prompt), ("in the data", sample.reference),
                *((_name(name, len(sample.answers)), text) for name, text in sample.answers.items())]
        for j, (name, text) in enumerate(rows):
            table.add_row(name, one_line(text, "bold" if j > 2 else ""), end_section=j + 1 == len(rows) and i + 1 < len(chosen))
    return table


def _name(name: str, number: int) -> str:
    shown = printable(name)
    return shown if number <= 2 and len(shown) <= 2 * _NAME_WIDTH or len(shown) <= _NAME_WIDTH else f"{shown[: _NAME_WIDTH - 1]}…"


def _short(value: float) -> str:
    """In five characters or six."""
    if value < 10_000:
        return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
