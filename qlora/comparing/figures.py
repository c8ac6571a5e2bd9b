"""The figures of a model on some rows, each with its interval, and what is different between two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora.comparing import intervals
from qlora.comparing.intervals import Interval
from qlora.evaluation import Evaluation, exact_hits, normalised_hits


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval, None where there is too little to tell."""

    value: float
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        return {"value": finite(self.value), "low": finite(self.interval and self.interval.low),
                "high": finite(self.interval and self.interval.high)}


@dataclass(frozen=True)
class Difference:
    """By how much an adapter is above the base, on the same rows, and what can be said of it.

    Attributes:
        outcome: "better" or "worse" where the interval excludes 0; else "no difference seen".
    """

    value: float
    interval: Interval | None
    outcome: str

    def to_json(self) -> dict[str, Any]:
        return {**Figure(self.value, self.interval).to_json(), "outcome": self.outcome}


@dataclass(frozen=True)
class Measured:
    """A model on some rows, row by row.

    Attributes:
        name: "base", or an adapter's short name.
        losses: nats, summed over the trained tokens of each row.
        tokens, bytes: of each row, that were trained on; see `qlora.comparing.rows.trained_bytes`.
        answers, references: of the rows that were answered, in the same order.
        rows_at_once: that the loss was taken of, after memory had its say.
        seconds: by what was done.
    """

    name: str
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    answers: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    rows_at_once: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def evaluation(self) -> Evaluation:
        """As a run's report has it."""
        share, number = sum(self.exact) / len(self.exact) if self.answers else None, sum(self.tokens)
        return Evaluation(math.fsum(self.losses) / max(1, number), number, share, len(self.answers), self.answers)

    @property
    def exact(self) -> list[bool]:
        """Which answers are their reference, word for word."""
        return exact_hits(self.answers, self.references)

    @property
    def normalised(self) -> list[bool]:
        """Which answers are it but for case, punctuation and articles; see `qlora.evaluation.normalised`."""
        return normalised_hits(self.answers, self.references)

    @property
    def figures(self) -> dict[str, Figure]:
        """Everything that can be said of it: loss (nats a token), perplexity (a token), bits_per_byte, byte_perplexity,
        exact_match and normalised_match (shares). What there is nothing for is left out.
        """
        found: dict[str, Figure] = {}
        if sum(self.tokens):
            loss = Figure(self.evaluation.loss, intervals.of_ratio(self.losses, self.tokens))
            found |= {"loss": loss, "perplexity": _mapped(loss, _exp)}
        if sum(self.bytes):
            nats = Figure(math.fsum(self.losses) / sum(self.bytes), intervals.of_ratio(self.losses, self.bytes))
            found |= {"bits_per_byte": _mapped(nats, lambda value: value / math.log(2)), "byte_perplexity": _mapped(nats, _exp)}
        for name, hits in (("exact_match", self.exact), ("normalised_match", self.normalised)):
            if hits:
                found[name] = Figure(sum(hits) / len(hits), intervals.of_share(sum(hits), len(hits)))
        return found

    def beside(self, base: Measured) -> dict[str, Difference]:
        """What is different from the base on the same rows, for loss, bits_per_byte, exact_match and normalised_match.
        Perplexities are better or worse where the losses are.
        """
        assert (self.tokens, self.bytes, self.references) == (base.tokens, base.bytes, base.references), "not the same rows"
        apart = [mine - theirs for mine, theirs in zip(self.losses, base.losses, strict=True)]
        found = {}
        for name, sizes, unit in (("loss", self.tokens, 1.0), ("bits_per_byte", self.bytes, math.log(2))):
            if sum(sizes):
                nats = Figure(math.fsum(apart) / sum(sizes), intervals.of_ratio(apart, sizes))
                scaled = _mapped(nats, lambda value, unit=unit: value / unit)
                found[name] = _difference(scaled.value, scaled.interval, lower=True)
        for name in ("exact", "normalised"):
            mine, theirs = getattr(self, name), getattr(base, name)
            if mine:
                value = (sum(mine) - sum(theirs)) / len(mine)
                found[f"{name}_match"] = _difference(value, intervals.of_paired_shares(mine, theirs), lower=False)
        return found

    def to_json(self, base: Measured | None = None) -> dict[str, Any]:
        """Figures, and beside a base what is different from it."""
        evaluation, figures = self.evaluation, self.figures
        document: dict[str, Any] = {
            "name": self.name, **{name: finite(figure.value) for name, figure in figures.items()},
            "num_rows": len(self.losses), "num_tokens": evaluation.num_tokens, "num_bytes": sum(self.bytes),
            "num_answers": evaluation.num_answers,
            "intervals": {name: [finite(figure.interval.low), finite(figure.interval.high)] if figure.interval else None
                          for name, figure in figures.items()},
        }
        if base is not None:
            document["beside_base"] = {name: each.to_json() for name, each in self.beside(base).items()}
        return document


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def row_document(each: Measured, places: Sequence[str]) -> list[dict[str, Any]]:
    """Loss, tokens and bytes of each row, for --per-row."""
    return [{"row": place, "loss": finite(loss), "num_tokens": tokens, "num_bytes": size}
            for place, loss, tokens, size in zip(places, each.losses, each.tokens, each.bytes, strict=True)]


def _mapped(figure: Figure, change: Any) -> Figure:
    return Figure(change(figure.value), figure.interval and figure.interval.map(change))


def _exp(value: float) -> float:
    """Infinite rather than an error where it overflows."""
    return math.exp(value) if value < 700 else math.inf


def _difference(value: float, interval: Interval | None, *, lower: bool) -> Difference:
    if interval is None or not interval.excludes_zero:
        return Difference(value, interval, "no difference seen")
    return Difference(value, interval, "better" if (value < 0) == lower else "worse")
