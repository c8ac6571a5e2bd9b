"""How sure a figure is: 95 % confidence intervals, of one model and of the difference between two on the same rows.

Rows are what was drawn independently, and tokens are not: those of a row depend on each other. So a loss is taken as a ratio of
two sums over rows, and its error from how much rows differ, as "Adding Error Bars to Evals" (https://arxiv.org/abs/2411.00640)
advises for questions that come in clusters, and for two models that answer the same ones: the difference is taken row by row,
where what makes a row easy or hard for both falls out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Interval:
    """From `low` to `high`."""

    low: float
    high: float

    def map(self, change: Callable[[float], float]) -> Interval:
        """Of a figure that rises with this one."""
        return Interval(change(self.low), change(self.high))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def of_ratio(parts: Sequence[float], sizes: Sequence[float]) -> Interval | None:
    """Of sum(parts) / sum(sizes) over rows, where each row brings one of both; None for fewer than two rows.

    The ratio estimator with its linearised variance, n / (n - 1) * sum((part - ratio * size)^2) / sum(sizes)^2 (Cochran, Sampling
    Techniques, 3rd edition, section 6.4), and Student's t with n - 1 degrees of freedom. With `parts` the differences of two
    models' losses on the same rows it is the paired interval of the difference.
    """
    number, total = len(parts), sum(sizes)
    if number < 2 or total <= 0 or not all(map(math.isfinite, parts)):
        return None
    ratio = math.fsum(parts) / total
    squares = math.fsum((part - ratio * size) ** 2 for part, size in zip(parts, sizes, strict=True))
    half = student_t(number - 1) * math.sqrt(number / (number - 1) * squares) / total
    return Interval(ratio - half, ratio + half)


def of_share(hits: int, number: int) -> Interval | None:
    """Of hits / number, by Wilson's score (https://doi.org/10.1080/01621459.1927.10502953), which holds for few rows and for
    shares of 0 and 1 as well; None without any.
    """
    if number == 0:
        return None
    z = NormalDist().inv_cdf(1 - _TAIL)
    share, weight = hits / number, z * z / number
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / number + weight / (4 * number))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def of_paired_shares(hits: Sequence[bool], hits_before: Sequence[bool]) -> Interval | None:
    """Of the difference between two shares of the same rows; None where no row tells the two apart.

    Only rows that one hits and the other misses tell them apart. Of these the share that the first hits has the exact interval of
    Clopper and Pearson (https://doi.org/10.1093/biomet/26.4.404), so the difference excludes 0 exactly where McNemar's exact test
    (https://doi.org/10.1007/BF02295996) rejects that there is none.
    """
    gained = sum(now and not before for now, before in zip(hits, hits_before, strict=True))
    lost = sum(before and not now for now, before in zip(hits, hits_before, strict=True))
    apart, number = gained + lost, len(hits)
    if apart == 0:
        return None
    low, high = _clopper_pearson(gained, apart)
    return Interval((2 * low - 1) * apart / number, (2 * high - 1) * apart / number)


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's distribution: exact for 1 and 2 degrees of freedom, above by the expansion about the normal
    one (Abramowitz and Stegun, 26.7.5), which is right to 0.3 % at 3 and to 0.01 % from 7 on.
    """
    p = 1 - _TAIL
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def _clopper_pearson(hits: int, number: int) -> tuple[float, float]:
    low = 0.0 if hits == 0 else _root(lambda p: 1 - _at_most(hits - 1, number, p) - _TAIL)
    high = 1.0 if hits == number else _root(lambda p: _TAIL - _at_most(hits, number, p))
    return low, high


def _at_most(hits: int, number: int, p: float) -> float:
    """Probability of so many hits or fewer."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or hits >= number else 0.0
    whole = math.lgamma(number + 1)
    return math.fsum(
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(number - k + 1) + k * math.log(p) + (number - k) * math.log1p(-p))
        for k in range(hits + 1)
    )


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of 0 to 1 is zero, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
