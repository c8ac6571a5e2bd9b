"""What a sweep found, as plain data: runs, the points that they are of, and what was decided by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora import guidance
from qlora.results.facts import RunSummary

DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Figures:
    """One finished run: a point with one seed.

    Attributes:
        folder: of the run, in the sweep's folder.
        parameters: that were trained.
        planned_bytes, measured_bytes: tensors on the device at their highest.
        seconds: of all phases.
        loss_before, loss_after: mean nats a token of the held-out rows; perplexity is exp of it.
        match_before, match_after: share of answers that are right word for word; None where no row was answered.
    """

    seed: int
    folder: str
    parameters: int
    planned_bytes: int
    measured_bytes: int
    seconds: float
    num_steps: int
    learning_rate: float
    loss_before: float
    loss_after: float
    match_before: float | None = None
    match_after: float | None = None

    @classmethod
    def of(cls, summary: RunSummary, seed: int, folder: str) -> Figures:
        """What a run's report says of it, which has held-out rows."""
        assert summary.before is not None and summary.after is not None, "a sweep has held-out rows"
        return cls(
            seed=seed, folder=folder, parameters=summary.model.trainable_parameters,
            planned_bytes=max(summary.planned_phases.values(), default=0),
            measured_bytes=max(summary.measured_phases.values(), default=0),
            seconds=summary.total_seconds, num_steps=summary.training.num_steps,
            learning_rate=summary.settings["train.learning_rate"].value,
            loss_before=summary.before.loss, loss_after=summary.after.loss,
            match_before=summary.before.exact_match, match_after=summary.after.exact_match,
        )


@dataclass(frozen=True)
class Point:
    """One combination of settings, and its runs.

    Attributes:
        name: of its folders.
        values: of the settings that are searched, as they were written; `settings` has them as a recipe takes them.
        runs: by seed; fewer than there are seeds where there is a `problem`.
        problem: why it counts for nothing: it does not fit, or diverged.
    """

    name: str
    values: dict[str, Any]
    settings: dict[str, Any]
    runs: tuple[Figures, ...] = ()
    problem: str = ""

    @property
    def good(self) -> bool:
        """It has a result for every seed."""
        return not self.problem

    @property
    def losses(self) -> list[float]:
        """Held-out loss after training, by seed."""
        return [run.loss_after for run in self.runs]

    @property
    def loss(self) -> float:
        """Their mean; infinite where there is none."""
        return statistics.fmean(self.losses) if self.good else math.inf

    @property
    def spread(self) -> float:
        """Their standard deviation, 0 for one seed."""
        return statistics.stdev(self.losses) if len(self.runs) > 1 else 0.0

    @property
    def parameters(self) -> int:
        return self.runs[0].parameters if self.runs else 0

    def to_json(self) -> dict[str, Any]:
        """For the study and for sweep.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Point:
        """What `to_json` wrote."""
        return cls(**{**document, "runs": tuple(Figures(**run) for run in document["runs"])})


@dataclass(frozen=True)
class Choice:
    """What a sweep came to.

    Attributes:
        point: None where not one has a result.
        reasons: one line for each decision, in order.
    """

    point: Point | None
    reasons: tuple[str, ...]


def smallest_as_good(points: Sequence[Point]) -> Choice:
    """Of all points that the best one does not beat clearly, that with the fewest parameters; of equals the lower loss."""
    good = [point for point in points if point.good]
    if not good:
        return Choice(None, ("No combination has a result.",))
    best = min(good, key=lambda point: point.loss)
    as_good = [point for point in good if not guidance.gain_pays(point.losses, best.losses).value]
    chosen = min(as_good, key=lambda point: (point.parameters, point.loss))
    if chosen is best:
        return Choice(best, (f"{best.name} has the lowest loss, and none with fewer parameters is as good.",))
    reason = guidance.gain_pays(chosen.losses, best.losses).reason
    return Choice(chosen, (f"{best.name} has the lowest loss, but it does not beat {chosen.name} clearly: {reason}.",
                           f"{chosen.name} has the fewest parameters of those that are as good."))


@dataclass(frozen=True)
class SweepResult:
    """A sweep, as far as it has come.

    Attributes:
        folder: of the sweep.
        search: "guided", "grid" or "tpe"; `keys` are the settings that it searches.
        seeds: that each point runs with.
        points: in the order in which they were tried.
        choice: None while it is not finished.
        command: what trains the winner again.
        facts: model, data, device and versions.
    """

    folder: str
    name: str
    search: str
    keys: tuple[str, ...]
    seeds: tuple[int, ...]
    points: tuple[Point, ...]
    choice: Choice | None
    command: str
    facts: dict[str, Any]

    @property
    def winner(self) -> Point | None:
        return self.choice.point if self.choice else None

    def to_json(self) -> dict[str, Any]:
        """sweep.json."""
        return {
            "name": self.name, "search": self.search, "keys": self.keys, "seeds": self.seeds, "facts": self.facts,
            "winner": self.winner.name if self.winner else None, "settings": self.winner.settings if self.winner else None,
            "reasons": self.choice.reasons if self.choice else (), "command": self.command,
            "points": [{**point.to_json(), **summary_of(point)} for point in self.points],
        }


def summary_of(point: Point) -> dict[str, Any]:
    """The row of a point: means over its seeds, and the standard deviation of the loss. Empty where it has no result."""
    if not point.good:
        return {}
    runs = point.runs
    matches = [(run.match_before, run.match_after) for run in runs if None not in (run.match_before, run.match_after)]
    before = statistics.fmean(run.loss_before for run in runs)
    return {
        "parameters": point.parameters, "planned_bytes": max(run.planned_bytes for run in runs),
        "measured_bytes": max(run.measured_bytes for run in runs), "seconds": statistics.fmean(run.seconds for run in runs),
        "learning_rate": runs[0].learning_rate, "loss_before": before, "loss_after": point.loss, "loss_spread": point.spread,
        "perplexity_before": _exp(before), "perplexity_after": _exp(point.loss),
        "match_before": statistics.fmean(before for before, _ in matches) if matches else None,
        "match_after": statistics.fmean(after for _, after in matches) if matches else None,
    }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
