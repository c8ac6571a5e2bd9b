"""Cut rows to a length, and say what the lengths of a data set are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlora.data.tokenise import IGNORED, TokenRow
from qlora.errors import DataError

_MAX_BARS = 12


@dataclass(frozen=True)
class FitResult:
    """Rows cut to a length, and what became of the others.

    Attributes:
        rows: what is left to train on; every one has at least one trained token.
        num_truncated: rows in `rows` whose end was cut off.
        num_end_lost: those of them that are cut in the middle of an answer, and so lost its end-of-turn.
        num_answer_lost: dropped, because the cut took every trained token.
        num_fully_masked: dropped, because they had no trained token from the start.
    """

    rows: list[TokenRow]
    num_truncated: int
    num_answer_lost: int
    num_fully_masked: int
    num_end_lost: int = 0

    def __add__(self, other: FitResult) -> FitResult:
        return FitResult(
            self.rows + other.rows,
            self.num_truncated + other.num_truncated,
            self.num_answer_lost + other.num_answer_lost,
            self.num_fully_masked + other.num_fully_masked,
            self.num_end_lost + other.num_end_lost,
        )


def fit_length(token_rows: Sequence[TokenRow], max_length: int) -> FitResult:
    """Cut the end off rows of more than `max_length` tokens, and drop rows that have nothing to train."""
    rows: list[TokenRow] = []
    num_truncated = num_end_lost = num_answer_lost = num_fully_masked = 0
    for row in token_rows:
        if not row.num_trained:
            num_fully_masked += 1
            continue
        if len(row.input_ids) > max_length:
            in_answer = IGNORED not in row.labels[max_length - 1 : max_length + 1]
            row = replace(row, input_ids=row.input_ids[:max_length], labels=row.labels[:max_length])
            if not row.num_trained:
                num_answer_lost += 1
                continue
            num_truncated += 1
            num_end_lost += in_answer
        rows.append(row)
    return FitResult(rows, num_truncated, num_answer_lost, num_fully_masked, num_end_lost)


def choose_max_length(lengths: Sequence[int], max_length: int | str, context_limit: int | None) -> int:
    """The longest row allowed, in tokens: a number, "auto" for the longest row there is, or a percentile such as "p99" of
    the lengths; the latter two at most what the model takes.

    Raises:
        DataError: a given length above the model's context limit.
    """
    if isinstance(max_length, str):
        share = 1.0 if max_length == "auto" else int(max_length.removeprefix("p")) / 100
        wanted = sorted(lengths)[max(0, math.ceil(len(lengths) * share) - 1)] if lengths else 1
        return max(1, min(wanted, context_limit or wanted))
    if context_limit is not None and max_length > context_limit:
        raise DataError(
            f"data.max_length is {max_length:,} tokens, but the model takes at most {context_limit:,}.",
            f"Set data.max_length to {context_limit} or less, or leave it out.",
        )
    return int(max_length)


@dataclass(frozen=True)
class LengthStats:
    """Lengths of rows. Percentiles are of the nearest rank, so each is the length of a row that exists.

    `histogram` holds (low, high, count) with both ends included, without gaps; the counts add up to the number of rows.
    """

    p50: int
    p95: int
    p99: int
    max: int
    mean: float
    histogram: list[tuple[int, int, int]]


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Percentiles and a histogram of at most twelve bars with round borders; all zero for no rows."""
    if not lengths:
        return LengthStats(0, 0, 0, 0, 0.0, [])
    ordered = sorted(lengths)
    p50, p95, p99 = (ordered[math.ceil(len(ordered) * share) - 1] for share in (0.50, 0.95, 0.99))
    width = _round_width((ordered[-1] - ordered[0] + 1) / _MAX_BARS)
    first = ordered[0] // width * width
    counts = [0] * ((ordered[-1] - first) // width + 1)
    for length in ordered:
        counts[(length - first) // width] += 1
    histogram = [(first + bar * width, first + (bar + 1) * width - 1, count) for bar, count in enumerate(counts)]
    return LengthStats(p50, p95, p99, ordered[-1], sum(ordered) / len(ordered), histogram)


def _round_width(at_least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that leaves at most twelve bars, borders at its multiples included."""
    width, factors = 1, (2, 2.5, 2)
    step = 0
    while width < at_least * _MAX_BARS / (_MAX_BARS - 1):
        width, step = int(width * factors[step % 3]), step + 1
    return width
