"""Rules that look at the rows of a run and say what to try: pure functions of metrics.jsonl and of what was decided, so that a
run that was cut short and gone on with gets the same advice.

What each rule recommends is in `qlora.guidance`. A rule fires once a run, and stays silent where what it sees could be noise or
has little weight: a warning that comes up in healthy runs is not read in the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from qlora import guidance
from qlora.training.loss_noise import BLOCK, LEARNT, SURE, error, is_higher, noise, swings

if TYPE_CHECKING:
    from qlora.architecture import TargetSelection
    from qlora.planning.plan import Decision

Rows = Sequence[Mapping[str, Any]]

# Set on runs of the embedded base made to diverge, swing, stall, overfit and die, and on healthy ones beside them, down to
# batches of one row; and so that made-up losses of nothing but noise, scattered as those of one row are, stay silent.
_FIRST = 3  # steps whose median is the beginning of a run that may diverge at once; with more it would have begun high
_FEW = 5  # steps whose median is a moment of a run
_WINDOW = 10  # steps that are held against the best such window
_MANY = 40  # steps that tell how noisy the loss is
_CLIMB = 0.1  # share of its beginning by which the loss is over it
_JUMP = 1.25  # times its beginning that a loss jumps to where adapters outweigh the base
_BACK = 1.5  # times its lowest that a loss comes back to, at least
_EXPLODED = 20.0  # times what it was at the beginning: a gradient norm
_DROWNED = 5.0  # times what the base gives: an adapter's part of an output. Healthy runs had up to 0.9
_NUM_BLOCKS = 10  # points that a swing is looked for in
_SWINGS = 8.0  # how many times the variance of these points is what independent steps would give
_WIDE = 0.15  # standard deviation of a swing, as a share of the loss
_STALLED = 0.02  # share of the loss by which it has not even fallen
_STALL_SHARE = 0.3  # of the run that has gone by
_SMALL_UPDATE = 1e-3  # (alpha / r) B A against W; adapters that learn are above it
_RISE, _RISE_SHARE = 0.02, 0.01  # nats, and share of the lowest held-out loss
_DEAD = 1e-7  # of a group's gradient against the largest, and of an update against the weights


@dataclass(frozen=True)
class Advice:
    """One rule that has fired.

    Attributes:
        text: what was found, a sentence with its numbers.
        override: words to add to the command.
    """

    rule: str
    text: str
    override: str

    def to_row(self) -> dict[str, str]:
        """As it is in metrics.jsonl."""
        return asdict(self)


@dataclass(frozen=True)
class Situation:
    """What was decided for a run, as far as advice hangs on it.

    Attributes:
        learning_rate: at its peak.
        targets: the adapted projections' names by kind, attention and mlp.
    """

    learning_rate: float
    r: int
    alpha: float
    num_steps: int
    warmup_steps: int
    epochs: float
    max_steps: int | None
    keep: str
    dtype: str
    num_rows: int
    targets: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, decisions: Mapping[str, Decision], num_steps: int, num_rows: int, selection: TargetSelection
    ) -> Situation:
        """From a plan's decisions."""
        value = {key: decision.value for key, decision in decisions.items()}
        kinds = {projection.kind for projection in selection.projections}
        return cls(
            learning_rate=value["train.learning_rate"], r=value["lora.r"], alpha=value["lora.alpha"], num_steps=num_steps,
            warmup_steps=round(value["train.warmup"] * num_steps), epochs=value["train.epochs"],
            max_steps=value["train.max_steps"], keep=value["train.keep"], dtype=value["model.dtype"], num_rows=num_rows,
            targets={kind: tuple(p.name for p in selection.projections if p.kind == kind) for kind in sorted(kinds)},
        )

    @property
    def effective_rate(self) -> float:
        """lr x alpha / r at its peak."""
        return guidance.effective_learning_rate(self.learning_rate, self.r, self.alpha)


def advise(rows: Rows, situation: Situation) -> Advice | None:
    """The first rule that fires on the rows so far and has not been told of in one of them."""
    given = {row["advice"]["rule"] for row in rows if "advice" in row}
    for name, rule in RULES.items():
        if name not in given and not given & _SAID_BY.get(name, set()):
            advice = rule(rows, situation)
            if advice is not None:
                return advice
    return None


# --- the rules ---------------------------------------------------------------------------------------------------------


def diverging(rows: Rows, situation: Situation) -> Advice | None:
    """The loss is above its beginning; or it has come back from its lowest more than half the way, in logarithms; or it has
    jumped far above its beginning, and the adapters outweigh the base, which is when less of a way back is enough, too.
    """
    losses, weight = _values(rows, "loss"), _weight(rows)
    begin, highest = median(losses[:_FIRST] or [0.0]), max(losses, default=0.0)
    if weight > 1 and highest > _JUMP * begin:
        return Advice("diverging", f"the loss was {begin:.3g} at the beginning and has jumped to {_figure(highest)}; "
                      f"{_outweigh(weight)}", _calmer(situation))
    if len(losses) < 2 * _WINDOW:
        return None
    begin, now, lately = median(losses[:_FEW]), median(losses[-_WINDOW:]), noise(losses[-_MANY:])
    if is_higher(now, begin, error((lately, _FEW), (lately, _WINDOW)), _CLIMB):
        return Advice("diverging", f"the loss is {now:.3g} and was {begin:.3g} at the beginning.", _calmer(situation))
    width, sure = (_FEW, SURE / 2) if weight > 1 else (_WINDOW, SURE)
    medians = [median(losses[i : i + width]) for i in range(len(losses) - width)]
    best, now = min(medians), median(losses[-width:])
    then = noise(losses[max(0, medians.index(best) - _WINDOW) :][:_MANY])
    back = _BACK if weight > 1 else max(math.sqrt(begin / best), _BACK) if best > 0 else math.inf
    if is_higher(now, best, error((then, width), (lately, width)), back - 1, sure=sure):
        return Advice("diverging", f"the loss had fallen from {begin:.3g} to {best:.3g} and is {now:.3g} now.",
                      _calmer(situation))
    return None


def oscillating(rows: Rows, situation: Situation) -> Advice | None:
    """Gradients jump while the adapters outweigh the base, or they drown it; or the loss goes up and down over the last 40 steps,
    more than the noise of its steps explains, and gets nowhere.
    """
    losses, norms, weight = _values(rows, "loss"), _values(rows, "grad_norm"), _weight(rows)
    usual, largest = median(norms[:_FEW] or [0.0]), max(norms[-2 * _WINDOW :], default=0.0)
    if weight > 1 and largest > _EXPLODED * usual:
        return Advice("oscillating", f"the gradient norm was {usual:.2g} at the beginning and has jumped to {_figure(largest)}; "
                      f"{_outweigh(weight)}", _calmer(situation))
    if weight > _DROWNED:
        return Advice("oscillating", _outweigh(weight), _calmer(situation))
    if len(losses) < situation.warmup_steps + BLOCK * _NUM_BLOCKS + _FEW:
        return None
    means, swing, within, trend = swings(losses[-BLOCK * _NUM_BLOCKS :])
    width, start = math.sqrt(swing), losses[: 4 * _FEW]
    is_real = BLOCK * swing > _SWINGS * within and width > max(_WIDE * fmean(means), fmean(start) * noise(start), LEARNT)
    if not is_real or trend > 2 * width:
        return None
    return Advice("oscillating", f"over the last {BLOCK * _NUM_BLOCKS} steps the loss swings between {min(means):.3g} and "
                  f"{max(means):.3g}, and gets nowhere.", _calmer(situation))


def dead_adapters(rows: Rows, situation: Situation) -> Advice | None:
    """In two looks in a row some groups have no gradient, or adapters that do not change their weights."""
    looks = _looks(rows)[-2:]
    if len(looks) < 2 or not situation.warmup_steps < _steps(rows):
        return None
    still = [{name for name, found in look.items() if found.get("update_ratio", 1.0) < _DEAD} for look in looks]
    largest = [max((_gradient(found) for found in look.values()), default=0.0) for look in looks]
    silent = [{name for name, found in look.items() if _gradient(found) <= _DEAD * most}
              for look, most in zip(looks, largest, strict=True)]
    without, unmoved = set.intersection(*silent), set.intersection(*still)
    if without:
        return Advice("dead adapters", f"no gradient reaches the adapters of {_listed(without, looks[-1])}.",
                      _reached(without, looks[-1], situation))
    if unmoved:
        return Advice("dead adapters", f"the adapters of {_listed(unmoved, looks[-1])} have not moved.",
                      f"train.learning_rate={_into_band(situation):g}")
    return None


def too_slow(rows: Rows, situation: Situation) -> Advice | None:
    """A good share of the run is over, the loss has hardly fallen, and there is room in the band to go faster."""
    losses = _values(rows, "loss")
    if len(losses) < max(4 * _FEW, _STALL_SHARE * situation.num_steps, situation.warmup_steps + 2 * _FEW):
        return None
    width = max(_FEW, len(losses) // 4)
    begin, now = fmean(losses[:width]), fmean(losses[-width:])
    updates = [found["update_ratio"] for look in _looks(rows)[-1:] for found in look.values() if "update_ratio" in found]
    settings = guidance.quicker(situation.learning_rate, situation.r, situation.alpha)
    under = situation.effective_rate < guidance.LEARNING_RATE_BAND[0] * (1 - 1e-6)
    if begin < LEARNT or now < begin * (1 - _STALLED) or not settings or not (under or max(updates, default=1.0) < _SMALL_UPDATE):
        return None
    found = (f"after {len(losses):,} of {situation.num_steps:,} steps the loss is {now:.3g} and was {begin:.3g}; the effective "
             f"rate is {situation.effective_rate:.2g}.")
    return Advice("too slow", found, words(settings))


def overfitting(rows: Rows, situation: Situation) -> Advice | None:
    """The held-out loss rises twice in a row from its lowest, while the training loss goes on falling."""
    found = [row for row in rows if "eval_loss" in row]
    if len(found) < 3:
        return None
    best = min(found, key=lambda row: row["eval_loss"])
    later = [row["eval_loss"] for row in found if row["step"] >= best["step"]]
    rise = later[-1] - best["eval_loss"]
    if len(later) < 3 or not later[-1] > later[-2] > later[-3] or rise < _RISE + _RISE_SHARE * best["eval_loss"]:
        return None
    until = [row["loss"] for row in rows if "loss" in row and row["step"] <= best["step"]]
    losses = _values(rows, "loss")
    if not until or not fmean(losses[-_FEW:]) < fmean(until[-_FEW:]):
        return None
    kept = "" if situation.keep == "best" else "train.keep=best "
    shorter = f"train.epochs={max(0.01, round(best['epoch'], 2)):g}"
    if situation.max_steps:
        shorter = f"train.max_steps={best['step']}"
    smaller = guidance.offer_smaller_rank(situation.num_rows, situation.r)
    rank = f" lora.r={smaller.value}" if smaller else ""
    text = f"the held-out loss was lowest at step {best['step']:,}, {best['eval_loss']:.3g}, and is {later[-1]:.3g} now."
    return Advice("overfitting", text, f"{kept}{shorter}{rank}")


RULES: dict[str, Callable[[Rows, Situation], Advice | None]] = {
    "diverging": diverging, "oscillating": oscillating, "dead adapters": dead_adapters, "too slow": too_slow,
    "overfitting": overfitting,
}
# What need not be said any more once something else has been.
_SAID_BY = {"diverging": {"oscillating"}, "oscillating": {"diverging"}, "too slow": {"diverging", "oscillating", "dead adapters"}}


# --- what to try -------------------------------------------------------------------------------------------------------


def _calmer(situation: Situation) -> str:
    return words(guidance.calmer(situation.learning_rate, situation.r, situation.alpha))


def words(settings: Mapping[str, float]) -> str:
    """Settings as they are added to a command."""
    return " ".join(f"{key}={value:g}" for key, value in settings.items())


def _into_band(situation: Situation) -> float:
    low, high = guidance.LEARNING_RATE_BAND
    scale = situation.alpha / situation.r
    return float(f"{(low if situation.effective_rate < low else min(2 * situation.effective_rate, high)) / scale:.6g}")


def _reached(without: set[str], look: Mapping[str, Any], situation: Situation) -> str:
    """Adapt only what a gradient reaches; where that is no whole kind, numbers with more range may help."""
    kinds = {name.partition(" ")[0] for name in look if name not in without}
    if situation.dtype == "fp16":
        return "model.dtype=fp32"
    lost = [kind for kind in situation.targets if kind not in kinds]
    alive = [name for kind, names in situation.targets.items() if kind in kinds for name in names]
    if lost and alive:
        return "lora.targets=attention" if "attention" in kinds else f"lora.targets=[{','.join(alive)}]"
    return "model.dtype=fp32" if situation.dtype != "fp32" else "lora.targets=attention"


def _listed(names: set[str], look: Mapping[str, Any]) -> str:
    return "all layers" if len(names) == len(look) else ", ".join(name for name in look if name in names)


# --- figures -----------------------------------------------------------------------------------------------------------


def _values(rows: Rows, key: str) -> list[float]:
    """Of training steps."""
    return [row[key] for row in rows if "loss" in row and row.get(key) is not None]


def _looks(rows: Rows) -> list[Mapping[str, Any]]:
    return [row["monitor"] for row in rows if "monitor" in row]


def _steps(rows: Rows) -> int:
    return max((row["step"] for row in rows), default=0)


def _gradient(found: Mapping[str, float]) -> float:
    return math.hypot(found.get("grad_a", 0.0), found.get("grad_b", 0.0))


def _weight(rows: Rows) -> float:
    """What the adapters of some group give at the last look, as a multiple of what the base gives."""
    found = [found.get("path_ratio", found.get("update_ratio", 0.0)) for look in _looks(rows)[-1:] for found in look.values()]
    return max(found, default=0.0)


def _outweigh(weight: float) -> str:
    return f"adapters give {_figure(weight)} times what the base gives."


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
