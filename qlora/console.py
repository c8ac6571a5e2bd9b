"""Progress on a terminal: bars while something runs, one plain line when it has. Into a file, lines only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn, DownloadColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from qlora.progress import Progress
from qlora.redact import redact
from qlora.units import format_bytes, format_seconds
from qlora.views import plan_view

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
        self.console.print(Text(f"  {redact(text)}"))

    def aside(self, text: str) -> None:
        """A line that is hardly worth one."""
        self.console.print(Text(f"  {redact(text)}", style="dim"))

    @contextmanager
    def stage(self, text: str, *, in_bytes: bool = False, bar: bool = True) -> Iterator[Callable[[int, int], None]]:
        started, text = time.perf_counter(), redact(text)
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn()]
        if in_bytes:
            columns[3:3] = [DownloadColumn(binary_units=True), _Speed()]
        with Bars(*columns, console=self.console, transient=True, disable=not (bar and self.console.is_terminal)) as bars:
            task = bars.add_task(text, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
        line = Text("✓ ", style="green").append(text, style="default")
        self.console.print(line.append(f"  {format_seconds(time.perf_counter() - started)}", style="dim"), soft_wrap=True)

    def planned(self, plan: Plan, folder: Path) -> None:
        self.console.print(plan_view(plan))
        self.console.print(Text(f"Run folder: {folder}"), soft_wrap=True)

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        self._num_steps = num_steps
        columns = (
            TextColumn("Training"), BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )
        with Bars(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            self._bars, self._task = bars, bars.add_task("train", total=num_steps, figures="")
            try:
                yield
            finally:
                self._bars = None

    def row(self, row: Mapping[str, Any]) -> None:
        if "eval_loss" in row:
            self._validation = f" · val {row['eval_loss']:.3f}"
            self._say(f"step {row['step']}: validation loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.2f}")
            return
        figures = (
            f"loss {row['loss']:.3f}{self._validation} · {row['tokens_per_second']:,.0f} tok/s · {format_bytes(row['memory_bytes'])}"
        )
        if self._bars is not None:
            self._bars.update(self._task, completed=row["step"], figures=figures)
        every = max(1, self._num_steps // _LINES_PER_RUN)
        if not self.console.is_terminal and (row["step"] % every == 0 or row["step"] == 1):
            self._say(f"step {row['step']}/{self._num_steps}: {figures}")

    def _say(self, text: str) -> None:
        self.console.print(Text(f"  {redact(text)}"))


class _Speed(ProgressColumn):
    """Bytes a second, in the units of everything else (rich has decimal ones)."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{format_bytes(speed)}/s" if speed else "")
