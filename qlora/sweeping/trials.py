"""Run a point: one ordinary run a seed, each in a folder of its own, on a base that all of them share."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import DivergedError, DoesNotFitError, InterruptedRun, OutputError, QloraError, ResumeError
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.sweeping.begun import TRIALS
from qlora.sweeping.results import DOES_NOT_FIT, Figures, Point
from qlora.sweeping.space import name_of, overrides_of, settings_of
from qlora.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from qlora.training.bases import Bases


@dataclass
class Trials:
    """Runs points and remembers how long that took.

    Attributes:
        at_most: there may be fewer runs than are said to be left.
        num_done, num_left: runs.
        seconds: of those that were run now, by wall clock.
    """

    folder: Path
    recipe: Recipe
    seeds: tuple[int, ...]
    bases: Bases
    progress: Progress
    at_most: bool = False
    num_done: int = 0
    num_left: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self, values: Mapping[str, Any], num_points_left: int) -> Point:
        """A point with every seed; what is on disk of it is not run again. One that does not fit or diverges has a problem, and
        its other seeds are not run.

        Raises:
            QloraError: what stops a run that could go on, such as a full disk or Ctrl-C.
        """
        name, settings = name_of(values, self.recipe), settings_of(values, self.recipe)
        runs: list[Figures] = []

        def made(problem: str = "") -> Point:
            return Point(name, dict(values), settings, tuple(runs), problem)

        for i, seed in enumerate(self.seeds):
            self.num_left = len(self.seeds) * (num_points_left + 1) - i
            folder = f"{TRIALS}/{name}-seed{seed}"
            try:
                runs.append(self._figures(folder, self.recipe_of(values, seed, folder), seed))
            except DoesNotFitError as error:
                needs = f"needs {format_bytes(error.needed_bytes)} of {format_bytes(error.budget_bytes)}"
                return made(f"{DOES_NOT_FIT}: {needs}")
            except DivergedError as error:
                return made(f"diverged with seed {seed}: {_first_sentence(error.problem)}")
            self.num_done += 1
            if not math.isfinite(runs[-1].loss_after):
                return made(f"with seed {seed} the held-out loss is not a finite number")
        return made()

    def recipe_of(self, values: Mapping[str, Any], seed: int, folder: str) -> Recipe:
        """The recipe of one run, as `qlora train` would be given it."""
        return self.recipe.with_overrides([*overrides_of(values, self.recipe), f"train.seed={seed}",
                                           f"output.dir={self.folder / folder}"])

    def _figures(self, name: str, recipe: Recipe, seed: int) -> Figures:
        from qlora.results.report import load_report

        folder = self.folder / name
        if not (folder / "report.json").is_file():
            self._train(name, recipe, seed)
        else:
            _refuse_another(folder, recipe)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run goes on from nothing
        return Figures.of(load_report(folder), seed, name)

    def _train(self, name: str, recipe: Recipe, seed: int) -> None:
        from qlora.training.run import train

        num, left = self.num_done + 1, self._time_left()
        most = "up to " if self.at_most else ""
        title = f"Run {num} of {most}{self.num_done + self.num_left}: {Path(name).name}{left}"
        started = time.perf_counter()
        try:
            with self.progress.stage(title) as update:
                train(recipe, _Inside(self.progress if not self.seconds else None, update), bases=self.bases)
        except InterruptedRun as error:
            raise InterruptedRun(f"In {name}: {error.problem}", "To go on with the sweep, give the same command again.",
                                 exit_code=error.exit_code) from None
        except (DoesNotFitError, DivergedError):
            raise
        except QloraError:
            self.progress.note(f"The sweep stopped in {name}; the same command goes on from there.")
            raise
        self.seconds.append(time.perf_counter() - started)

    def _time_left(self) -> str:
        if not self.seconds:
            return ""
        seconds = self.num_left * sum(self.seconds) / len(self.seconds)
        return f", {'up to' if self.at_most else 'about'} {format_seconds(seconds)} left"


class _Inside(Progress):
    """What a run says while a sweep has the screen: its steps move the sweep's bar. Its plain lines are passed on for the first
    run alone; those of all are in their reports.
    """

    def __init__(self, outer: Progress | None, update: Callable[[int, int], None]):
        self._outer, self._update, self._num_steps = outer, update, 0

    def note(self, text: str) -> None:
        if self._outer is not None:
            self._outer.note(text)

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        self._num_steps = num_steps
        yield

    def row(self, row: Mapping[str, Any]) -> None:
        if self._num_steps:
            self._update(row["step"], self._num_steps)


def _first_sentence(text: str) -> str:
    return text.split("\n")[0].split(". ")[0].rstrip(".")


def _refuse_another(folder: Path, recipe: Recipe) -> None:
    """A finished run counts only where its settings are this point's.

    Raises:
        ResumeError: they are not, or it does not say.
    """
    from qlora.training.run_documents import differences, read_saved

    saved = read_saved(folder)
    changed = differences(saved.recipe, recipe) if saved else ["it does not say with which settings it was made"]
    if changed:
        raise ResumeError(f"{folder} is a finished run of something else:\n  " + "\n  ".join(changed),
                          "Move it away, or name another folder with --out.")


def prune(folder: Path, points: tuple[Point, ...], winner: Point | None, keep: str) -> None:
    """Remove the adapters that are not to be kept; reports, figures and plots stay.

    Args:
        keep: "all", "best" (the winner's, of every seed) or "none".

    Raises:
        OutputError: the disk does not let go of them.
    """
    if keep == "all":
        return
    for point in points:
        if keep == "best" and winner is not None and point.name == winner.name:
            continue
        for run in point.runs:
            try:
                if (folder / run.folder / "adapter").exists():
                    shutil.rmtree(folder / run.folder / "adapter")
            except OSError as error:
                raise OutputError(f"{folder / run.folder / 'adapter'} cannot be removed: {error.strerror or error}.",
                                  "Remove it by hand; the sweep is finished.") from error
