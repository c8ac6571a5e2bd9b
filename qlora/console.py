"""Progress on a terminal: bars while something runs, one plain line when it has. Into a file, lines only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from qlora.progress import Progress
from qlora.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qlora.planning.plan import Plan

_LINES_PER_RUN = 20


class ConsoleProgress(Progress):
    """Draws on stderr, so that stdout keeps only results."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._num_steps = 0
        self._validation = ""

    def note(self, text: str) -> None:
        self.console.print(Text(f"  {text}"))

    @contextmanager
    def stage(self, text: str) -> Iterator[Callable[[int, int], None]]:
        started = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(text, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
        line = Text("✓ ", style="green").append(text, style="default")
        self.console.print(line.append(f"  {format_seconds(time.perf_counter() - started)}", style="dim"))

    def planned(self, plan: Plan, folder: Path) -> None:
        self.console.print(settings_table(plan))
        least = f"Weights, gradients and optimizer state take {format_bytes(plan.least_bytes)}"
        self.console.print(Text(f"{least} of {format_bytes(plan.budget_bytes)} on {plan.device}; activations come on top.",
                                style="dim"))
        self.console.print(Text(f"Run folder: {folder}"))

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        self._num_steps = num_steps
        columns = (
            TextColumn("Training"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console, transient=False) as bars:
            self._bars, self._task = bars, bars.add_task("train", total=num_steps, figures="")
            try:
                yield
            finally:
                self._bars = None

    def row(self, row: Mapping[str, Any]) -> None:
        if "eval_loss" in row:
            self._validation = f" · validation {row['eval_loss']:.3f}"
            self._say(f"step {row['step']}: validation loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.2f}")
            return
        figures = (
            f"loss {row['loss']:.3f}{self._validation} · {row['tokens_per_second']:,.0f} tokens/s "
            f"· {format_bytes(row['memory_bytes'])}"
        )
        if self._bars is not None:
            self._bars.update(self._task, completed=row["step"], figures=figures)
        every = max(1, self._num_steps // _LINES_PER_RUN)
        if not self.console.is_terminal and (row["step"] % every == 0 or row["step"] == 1):
            self._say(f"step {row['step']}/{self._num_steps}: {figures}")

    def _say(self, text: str) -> None:
        self.console.print(Text(f"  {text}"))


def settings_table(plan: Plan) -> Table:
    """Every setting that a person did not give, with its reason; given ones without."""
    table = Table(title=f"Plan for {plan.model}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("setting")
    table.add_column("value", style="bold", overflow="fold")
    table.add_column("because", style="dim")
    for key, decision in plan.decisions.items():
        if decision.source != "default":
            table.add_row(key, _shown(decision.value), decision.reason)
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
