"""`qlora sweep --dry-run`: what would be tried, whether it fits, and about how long it takes. Trains nothing, writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from qlora.progress import Progress
from qlora.recipe import Recipe
from qlora.sweeping import Order
from qlora.sweeping.begun import look, refuse_foreign
from qlora.sweeping.search import most_points
from qlora.sweeping.space import Space, Values, grid_points, largest_point, name_of, overrides_of


@dataclass(frozen=True)
class Planned:
    """One point as it is planned.

    Attributes:
        seconds: of training one seed, an estimate; None where the plan has none.
    """

    name: str
    fits: bool
    peak_bytes: int
    budget_bytes: int
    parameters: int
    seconds: float | None


@dataclass(frozen=True)
class Preview:
    """The plans of a sweep.

    Attributes:
        num_points: that it may come to, at most.
        points: those that were planned: all of a grid; of a guided search those that need most; of a drawn one the largest.
    """

    search: str
    num_points: int
    num_seeds: int
    points: tuple[Planned, ...]

    @property
    def seconds(self) -> float | None:
        """Of training all runs, at most; None where that cannot be said."""
        known = [point.seconds for point in self.points if point.fits]
        if not known or None in known:
            return None
        return self.num_seeds * (sum(known) + (self.num_points - len(self.points)) * max(known))


def preview(order: Order, progress: Progress | None = None) -> Preview:
    """Plan what the sweep would try.

    Raises:
        QloraError: as `qlora.sweeping.sweep`.
    """
    progress = progress or Progress()
    refuse_foreign(order.folder)
    grounds = look(order.recipe, order.search, order.space, order.seeds, progress)
    values = _points(order.search, order.space)
    planned = []
    with progress.stage(f"Planning {len(values)} combinations") as update:
        for number, each in enumerate(values, 1):
            recipe = grounds.recipe.with_overrides(overrides_of(each, grounds.recipe))
            planned.append(_plan(name_of(each, grounds.recipe), recipe))
            update(number, len(values))
    return Preview(order.search, most_points(order.search, order.space, order.num_trials), len(order.seeds), tuple(planned))


def _points(search: str, space: Space) -> list[Values]:
    if search == "grid":
        return list(grid_points(space))
    if search == "tpe":
        return [largest_point(space)]
    start = {key: values[-1] if key == "lora.targets" else values[0] for key, values in space.items()}
    ranks = [{**start, "lora.r": r} for r in space["lora.r"]] if "lora.r" in space else [start]
    last = ranks[-1]
    return [*ranks, *({**last, key: value} for key in ("lora.alpha", "lora.targets") if key in space
                      for value in space[key] if value != last[key])]


def _plan(name: str, recipe: Recipe) -> Planned:
    from qlora.architecture import lora_parameters
    from qlora.training.setup import prepare

    setup = prepare(recipe)
    plan, data = setup.plan, setup.data
    tokens = data.num_tokens / max(1, len(data.train)) * (plan.num_steps or 0) * plan.settings["train.batch"]
    return Planned(
        name, plan.fits, plan.peak_bytes, plan.budget_bytes, lora_parameters(setup.selection, plan.settings["lora.r"]),
        tokens / plan.tokens_per_second if plan.tokens_per_second else None,
    )
