"""`qlora sweep`: which rank, which alpha, which targets, measured on your rows and with its spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import BusyError, DivergedError, HardwareError, OutputError, QloraError
from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.sweeping.begun import TRIALS, Grounds, go_on, look, refuse_foreign
from qlora.sweeping.results import DOES_NOT_FIT, Choice, Point, SweepResult, summary_of
from qlora.sweeping.search import grid, guided, most_points, tpe
from qlora.sweeping.space import Space, guided_space, overrides_of, read_space

__all__ = ["Order", "SweepResult", "read_order", "sweep"]

NUM_SEEDS = 3  # the fewest with which a spread means anything; one more costs as much as each of those


@dataclass(frozen=True)
class Order:
    """What is to be swept.

    Attributes:
        search: "guided", "grid" or "tpe".
        num_trials: points of tpe.
        keep: whose adapters stay, see `qlora.sweeping.trials.prune`.
    """

    recipe: Recipe
    search: str
    space: Space
    seeds: tuple[int, ...]
    folder: Path
    num_trials: int = 20
    keep: str = "best"


def read_order(
    recipe: Recipe, *, grid: Sequence[str] | None = None, space: Sequence[str] | None = None, num_seeds: int = NUM_SEEDS,
    num_trials: int = 20, out: str | None = None, keep: str = "best",
) -> Order:
    """An order from words: `grid` names values (lora.r=8,16), `space` ranges as well (train.learning_rate=1e-4..5e-4); with
    neither guidance's order is followed.

    Raises:
        RecipeError: see `qlora.sweeping.space`.
    """
    if grid is not None:
        search, searched = "grid", read_space(grid, recipe, ranges=False)
    elif space is not None:
        search, searched = "tpe", read_space(space, recipe, ranges=True)
    else:
        search, searched = "guided", guided_space(recipe)
    seeds = tuple(recipe.train.seed + i for i in range(num_seeds))
    folder = Path(out).expanduser() if out else Path("runs") / f"{recipe.name}-sweep"
    return Order(recipe, search, searched, seeds, folder, num_trials, keep)


def sweep(order: Order, progress: Progress | None = None) -> SweepResult:
    """Try every point that the search asks for, each with every seed, and say which to take.

    A sweep that was cut short goes on: what is finished is read, the run that was broken off continues from its checkpoint, and
    the table is the one that it would have been, but for seconds.

    Raises:
        QloraError: nothing to search, no held-out rows, a folder of something else, a recipe or rows that have changed, not one
            point with a result; or what stops a run.
    """
    from qlora.sweeping.study import Study
    from qlora.sweeping.trials import Trials, prune
    from qlora.sweeping.writing import write
    from qlora.training.bases import Bases

    progress, folder = progress or Progress(), order.folder
    refuse_foreign(folder)
    grounds = look(order.recipe, order.search, order.space, order.seeds, progress)
    with ExitStack() as held:
        _lock(held, folder)
        study = Study(folder, order.recipe.train.seed)
        if study.facts is None:
            study.begin(grounds.facts)
        else:
            grounds = go_on(grounds, study.facts, order.recipe, progress)
        trials = Trials(folder, grounds.recipe, order.seeds, Bases(), progress, at_most=order.search == "guided")
        held.callback(trials.bases.let_go)
        seen: dict[str, Point] = {}

        def evaluate(values: Mapping[str, Any], num_left: int) -> Point:
            point = study.find(_name(values, grounds)) or trials.run(values, num_left)
            if study.find(point.name) is None:
                study.add(point, order.space)
            else:
                trials.num_done += len(point.runs) * (point.name not in seen)
            if point.name not in seen:
                seen[point.name] = point
                _tell(point, progress)
                write(_result(order, grounds, tuple(seen.values()), None), folder)
            return point

        choice = _search(order, evaluate, study)
        result = _result(order, grounds, tuple(seen.values()), choice)
        write(result, folder)
        if choice.point is None:
            raise _without_result(result.points)
        prune(folder, result.points, choice.point, order.keep)
    return result


def _search(order: Order, evaluate: Any, study: Any) -> Choice:
    if order.search == "guided":
        return guided(order.space, evaluate)
    return grid(order.space, evaluate) if order.search == "grid" else tpe(order.space, evaluate, study, order.num_trials)


def _name(values: Mapping[str, Any], grounds: Grounds) -> str:
    from qlora.sweeping.space import name_of

    return name_of(values, grounds.recipe)


def _tell(point: Point, progress: Progress) -> None:
    """One line a point."""
    if not point.good:
        progress.note(f"{point.name}: {point.problem}")
        return
    spread = f" ± {point.spread:.4f}" if len(point.runs) > 1 else ""
    before = summary_of(point)["loss_before"]
    progress.note(f"{point.name}: held-out loss {before:.4f} → {point.loss:.4f}{spread}")


def _without_result(points: tuple[Point, ...]) -> QloraError:
    problem = "Not one combination has a result:" + "".join(f"\n  {point.name}: {point.problem}" for point in points)
    if all(point.problem.startswith(DOES_NOT_FIT) for point in points):
        return HardwareError(problem, "`qlora plan` says what would fit.")
    return DivergedError(problem, "Lower train.learning_rate, or lora.alpha.")


def _result(order: Order, grounds: Grounds, points: tuple[Point, ...], choice: Choice | None) -> SweepResult:
    from qlora.results.report import reproduce_command

    recipe = order.recipe
    command = ""
    if choice is not None and choice.point is not None:
        command = reproduce_command(recipe.source, (*recipe.overrides, *overrides_of(choice.point.values, recipe)))
    return SweepResult(
        folder=str(order.folder), name=recipe.name, search=order.search, keys=tuple(order.space), seeds=order.seeds,
        points=points, choice=choice, command=command,
        facts={key: grounds.facts[key] for key in ("model", "data", "device", "versions", "budget")},
    )


def _lock(held: ExitStack, folder: Path) -> None:
    from qlora.training.lock import RunLock

    try:
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}.", "Name another folder with --out.") from error
    try:
        held.enter_context(RunLock(folder))
    except BusyError as error:
        raise BusyError(error.problem, "Wait until that sweep has ended, or name another folder with --out.") from None
