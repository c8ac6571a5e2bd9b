"""In which order points are tried. Each search is a plain function of the results so far, so that the same ones lead to the same
next point, today or after a stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora import guidance
from qlora.sweeping.results import Choice, Point, smallest_as_good
from qlora.sweeping.space import Space, Values, grid_points
from qlora.sweeping.study import Study

Evaluate = Callable[[Mapping[str, Any], int], Point]
"""Runs a point with every seed. The second word says how many more points there may be after it, at most."""


def guided(space: Space, evaluate: Evaluate) -> Choice:
    """Guidance's order: rank until doubling stops paying, then alpha at that rank, then targets. A setting that is not in the
    space is fixed, and its stage is left out.

    A step up is taken where it pays (`qlora.guidance.gain_pays`), so what is chosen is the least that nothing beats clearly.
    """
    reasons: list[str] = []
    start: Values = {key: values[-1] if key == "lora.targets" else values[0] for key, values in space.items()}
    left = _most_points(space)
    tried: dict[tuple[Any, ...], Point] = {}

    def look(values: Mapping[str, Any]) -> Point:
        nonlocal left
        key = tuple(values.values())
        if key not in tried:
            left -= 1
            tried[key] = evaluate(values, left)
        return tried[key]

    best = look(start)
    for key, stops_early in (("lora.r", True), ("lora.alpha", False), ("lora.targets", False)):
        if key not in space or not best.good:
            continue
        others = [value for value in space[key] if value != best.values[key]]
        if key == "lora.targets":  # the largest is what all the others were tried with, and the walk goes up from the smallest
            walk = [look({**best.values, key: value}) for value in space[key]]
        else:
            walk = [best, *(look({**best.values, key: value}) for value in others[: 1 if stops_early else None])]
        best, said, rest = walk[0], [], walk[1:]
        while rest:
            best, line, paid = _step(best, rest.pop(0), key)
            said.append(line)
            if stops_early and paid and (following := _after(space[key], best.values[key])) is not None:
                rest = [look({**best.values, key: following})]
        reasons += said
        if said and key != "lora.targets" and best.values[key] == space[key][-1]:
            reasons.append(f"{key} {best.settings[key]} is the highest that was tried and still paid; --grid tries others.")
        if key == "lora.r":
            left = _most_points({other: values for other, values in space.items() if other != "lora.r"}) - 1
    return Choice(best if best.good else None, tuple(reasons) if reasons else ("No combination has a result.",))


def grid(space: Space, evaluate: Evaluate) -> Choice:
    """Every combination."""
    points = list(grid_points(space))
    return smallest_as_good([evaluate(values, len(points) - i) for i, values in enumerate(points, 1)])


def tpe(space: Space, evaluate: Evaluate, study: Study, num_trials: int) -> Choice:
    """Points that Optuna's tree-structured Parzen estimator proposes, each from the results of those before."""
    tried: dict[str, Point] = {}
    for number in range(num_trials):
        point = evaluate(study.propose(space, number, len(tried)), num_trials - number - 1)
        tried[point.name] = point
    return smallest_as_good(list(tried.values()))


def most_points(search: str, space: Space, num_trials: int) -> int:
    """How many points there are at most."""
    if search == "tpe":
        return num_trials
    return len(list(grid_points(space))) if search == "grid" else _most_points(space)


def _step(best: Point, more: Point, key: str) -> tuple[Point, str, bool]:
    """The better of two points, one line that says why, and whether more paid."""
    words = f"{key} {best.settings[key]} → {more.settings[key]}"
    if not more.good:
        return best, f"{words}: {more.problem}", False
    if not best.good:
        return more, f"{words}: {best.problem}", True
    found = guidance.gain_pays(best.losses, more.losses)
    said = "which pays" if found.value else "which does not pay"
    return (more if found.value else best), f"{words}: {found.reason}, {said}.", found.value


def _after(values: Any, value: Any) -> Any:
    number = values.index(value) + 1
    return values[number] if number < len(values) else None


def _most_points(space: Space) -> int:
    return 1 + sum(len(values) - 1 for values in space.values())
