"""How noisy a loss is, and whether one moment of a run is really above another: plain statistics over the losses of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

SURE = 5.0  # standard errors by which a loss must be higher than another; there are fifty looks a run, and all must be silent
LEARNT = 0.05  # nats: a difference that counts, and a loss that leaves nothing to fall
BLOCK = 4  # steps whose mean loss is one point of a swing
_TINY = 1e-6  # a loss under which nothing is told apart


def is_higher(value: float, other: float, error: float, share: float, *, sure: float = SURE) -> bool:
    """By this share at least, by something that counts, and beyond doubt. The error is that of their logarithms' difference."""
    apart = math.log(max(value, _TINY) / max(other, _TINY))
    return value - other > LEARNT and apart > max(math.log1p(share), sure * error)


def noise(values: Sequence[float]) -> float:
    """Standard deviation of the logarithms' independent noise, from differences of neighbours: a trend hardly counts, and nor do
    single spikes. Losses of few tokens scatter in proportion to themselves.
    """
    logs = [math.log(max(value, _TINY)) for value in values]
    steps = [abs(after - before) for before, after in zip(logs, logs[1:])]
    return 1.4826 * median(steps) / math.sqrt(2) if steps else 0.0


def error(*medians: tuple[float, int]) -> float:
    """Standard error of the difference of two medians of logarithms, given the noise and the number of values of each; 1.25 times
    that of means.
    """
    return 1.25 * math.sqrt(sum(noise**2 / count for noise, count in medians))


def swings(losses: Sequence[float]) -> tuple[list[float], float, float, float]:
    """Means of blocks of steps; their variance around a line; the variance of steps in a block; and how far the line goes.

    Of independent steps the first variance is the second divided by the size of a block (an F test holds one against the other).
    """
    blocks = [losses[i : i + BLOCK] for i in range(0, len(losses), BLOCK)]
    means = [fmean(block) for block in blocks]
    slope, middle, mean = _slope(means), (len(means) - 1) / 2, fmean(means)
    swing = sum((each - mean - slope * (i - middle)) ** 2 for i, each in enumerate(means)) / (len(means) - 2)
    within = fmean([sum((loss - fmean(block)) ** 2 for loss in block) / (BLOCK - 1) for block in blocks])
    return means, swing, within, abs(slope) * (len(means) - 1)


def _slope(values: Sequence[float]) -> float:
    middle, mean = (len(values) - 1) / 2, fmean(values)
    above = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    return above / sum((i - middle) ** 2 for i in range(len(values)))
