"""Find the settings that make the most of a budget.

Pure decisions: what a candidate needs is told by a function, which simulates it. The order is lexicographic, quality first:
the length that covers the data is not touched; then a rank of 16 or more on the chosen projections, with as little of the memory
engine as that takes; then rows at once; then a higher rank; then speed (no recomputation); then uncompressed optimizer state; then
more rows at once, or more layers on the device, in what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from qlora.engine.placement import Placement
from qlora.guidance import LAST_RESORT_RANKS

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Candidate:
    """What the search may change."""

    r: int
    micro_batch: int
    checkpointing: bool
    optimizer: str
    max_length: int
    placement: Placement = Placement()


@dataclass(frozen=True)
class Options:
    """Values to choose from, each list from the least memory to the most; one value where a person fixed it.

    Attributes:
        last_ranks: tried, largest first, only where the lowest of `ranks` does not fit.
        spare_micro_batches: larger ones than speed has much use for, for the room that is left at the end.
        placements: what the memory engine may do, from nothing to all it can. Those that stream begin with no layer resident, and
            as many as fit, of `num_resident`, stay on the device in the end: see `with_residents`.
    """

    ranks: tuple[int, ...]
    micro_batches: tuple[int, ...]
    checkpointing: tuple[bool, ...]
    optimizers: tuple[str, ...]
    max_length: int
    last_ranks: tuple[int, ...] = ()
    spare_micro_batches: tuple[int, ...] = ()
    placements: tuple[Placement, ...] = (Placement(),)
    num_resident: tuple[int, ...] = (0,)

    @property
    def least(self) -> Candidate:
        """The one that needs least, but for the last ranks."""
        return self.least_with(self.placements[-1])

    def least_with(self, placement: Placement) -> Candidate:
        """The one that needs least of those with a placement."""
        return Candidate(
            self.ranks[0], self.micro_batches[0], self.checkpointing[0] or placement.schedules, self.optimizers[0], self.max_length,
            placement,
        )


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        fits: False where not even the least candidate does; `candidate` is then that one.
        reasons: for each field of the candidate, one line.
        num_tried: candidates that were looked at.
    """

    candidate: Candidate
    fits: bool
    reasons: dict[str, str]
    num_tried: int


def search(options: Options, fits: Callable[[Candidate], bool]) -> Found:
    """The best candidate that fits.

    Args:
        fits: must be monotone: what fits goes on fitting when one value is replaced by an earlier one of its list.
    """
    tried: dict[Candidate, bool] = {}

    def ok(candidate: Candidate) -> bool:
        if candidate not in tried:
            tried[candidate] = fits(candidate)
        return tried[candidate]

    candidate, reasons = options.least, {}
    fitting = next((least for placement in options.placements if ok(least := options.least_with(placement))), None)
    if fitting is not None:
        candidate = fitting
    else:
        ranks = [r for r in options.last_ranks if ok(replace(candidate, r=r))]
        if not ranks:
            return Found(candidate, False, _reasons_for_least(options), len(tried))
        candidate = replace(candidate, r=ranks[0])
        reasons["r"] = f"{ranks[0]}, under {options.ranks[0]}, because nothing larger fits; the adapters can learn less"
    for field, choices in (("micro_batch", options.micro_batches), ("r", options.ranks),
                           ("checkpointing", options.checkpointing), ("optimizer", options.optimizers)):
        if field in reasons or len(choices) == 1 or (field == "checkpointing" and candidate.placement.schedules):
            continue
        value, limited = _largest(choices, lambda value: ok(replace(candidate, **{field: value})))
        candidate = replace(candidate, **{field: value})
        reasons[field] = _reason(field, value, limited, choices)
    if candidate.placement.schedules:
        reasons["checkpointing"] = "the engine keeps what goes into a layer, and computes the rest anew"
    if options.spare_micro_batches and candidate.micro_batch == options.micro_batches[-1] and not candidate.placement.streams:
        choices = (candidate.micro_batch, *options.spare_micro_batches)
        rows, _ = _largest(choices, lambda rows: ok(replace(candidate, micro_batch=rows)))
        if rows > candidate.micro_batch:
            candidate = replace(candidate, micro_batch=rows)
            reasons["micro_batch"] = "there is room for more rows at once"
    return Found(candidate, True, reasons, len(tried))


def with_residents(candidate: Candidate, options: Options, ok: Callable[[Candidate], bool]) -> Candidate:
    """As many of the layers on the device as fit, where they are streamed."""
    if not candidate.placement.streams:
        return candidate

    def with_resident(count: int) -> Candidate:
        return replace(candidate, placement=replace(candidate.placement, resident_layers=count))

    return with_resident(_largest(options.num_resident, lambda count: ok(with_resident(count)))[0])


def _largest(values: Sequence[_Value], ok: Callable[[_Value], bool]) -> tuple[_Value, bool]:
    """The last value that is ok, the first one being so; and whether a later one is not. From the top, then by halves:
    often everything fits.
    """
    if ok(values[-1]):
        return values[-1], False
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ok(values[middle]) else (low, middle)
    return values[low], True


def _reason(field: str, value: Any, limited: bool, choices: Sequence[Any]) -> str:
    if field == "micro_batch":
        return "the most rows at once that fit" if limited else "as many rows at once as speed has use for"
    if field == "r":
        return "the largest rank that fits" if limited else "the largest rank that the rules give this run"
    if field == "checkpointing":
        return "recomputing saves memory, and without it this does not fit" if limited else "off: there is room to keep activations"
    if limited:
        return f"{choices[-1]} does not fit beside the rest"
    return "the state of LoRA weights is small; there is room for it uncompressed"


def _reasons_for_least(options: Options) -> dict[str, str]:
    least = "the least there is, and it does not fit"
    varied: Iterable[tuple[str, Sequence[Any]]] = (
        ("r", options.ranks), ("micro_batch", options.micro_batches), ("checkpointing", options.checkpointing),
        ("optimizer", options.optimizers),
    )
    return {field: least for field, choices in varied if len(choices) > 1}


def last_ranks(lowest: int) -> tuple[int, ...]:
    """Ranks under the default band, for when nothing else fits; largest first."""
    return tuple(r for r in LAST_RESORT_RANKS if r < lowest)


def largest_length(need: Callable[[int], int], room_bytes: int, low: int, high: int, step: int = 64) -> int:
    """The longest length from `low` to `high` whose need is within the room, to a multiple of `step` or to a hundredth, whichever is
    more; `low` must be.

    The need is close to a line, so the crossing is looked for where a line through the two ends has it, and the ends are
    drawn together; each need is a simulation.
    """
    needs = {low: need(low), high: need(high)} if high > low else {}
    if high <= low or needs[high] <= room_bytes:
        return max(low, high)
    while high - low > step:
        crossing = low + (high - low) * (room_bytes - needs[low]) / (needs[high] - needs[low])
        if len(needs) > 2 and max(step, crossing - low) <= low / 100:
            break
        guess = round(crossing / step) * step
        # A step inside of either end, so that a crossing next to an end is pinned from both sides.
        guess = max(low + 1, min(high - 1, max(low // step * step + step, min(guess, (high - 1) // step * step))))
        if guess in needs:
            break
        needs[guess] = need(guess)
        low, high = (guess, high) if needs[guess] <= room_bytes else (low, guess)
    return low
