"""How far a mean or a percentile can be trusted: warm-up, replications, batch means, order statistics.

A run is exact for its seed: the same scenario gives the same numbers. What an interval tells is how far they
would move under other seeds (replications), or how far a run of this length is from one without end (batch
means, order statistics). Nothing here assumes more than it says; where the data do not suffice, there is no
interval and a sentence why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, exp, floor, isfinite, lgamma, log, log1p, sqrt
from typing import Any

import numpy as np

from clustersim.units import show

#: How sure an interval is, unless somebody asks for another level.
LEVEL = 0.95
#: Values per batch of MSER-5, which are averaged before a cut is looked for.
_MSER = 5
#: Batches whose means count as independent; fewer, longer ones are tried while neighbours are correlated.
#: Source: Schmeiser, Operations Research 30(3), 1982: 10 to 30 batches, more gain nothing.
_BATCHES = (30, 20, 10)
#: Relative: what equal durations differ by when they stand at different times of a run.
_ROUNDOFF = 1e-9
#: Of a normal distribution with deviation 1, one value in 20 is larger.
_ONE_IN_20 = 1.645
_MOST_ITERATIONS = 300


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and how far it can be trusted.

    value      mean or percentile
    low, high  between them the true one lies with probability `level`; None where that is not known
    level      e.g. 0.95
    count      values it rests on
    how        a clause: how it was found, or why there is none
    """

    value: float
    low: float | None
    high: float | None
    level: float
    count: int
    how: str

    @property
    def half_width(self) -> float | None:
        """Half of high - low."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def holds(self, value: float) -> bool | None:
        """Whether it contains a value; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= value <= self.high

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "value": self.value, "low": self.low, "high": self.high, "half_width": self.half_width,
            "level": self.level, "count": self.count, "how": self.how,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How much of the beginning of a series does not belong to its steady state.

    cut      values to leave out
    count    of so many
    settled  whether the rule found a cut before half; else half was cut and a trend may remain
    words    a sentence
    """

    cut: int
    count: int
    settled: bool
    words: str


# ---- warm-up --------------------------------------------------------------------------------------------


def warm_up(series: Any) -> WarmUp:
    """Where the warm-up ends, by MSER-5; never more than half is cut.

    series   float[n] in order of time
    Source   White, Simulation 69(6), 1997; batches of five: White, Cobb, Spratt, Winter Simulation
             Conference 2000. The cut is where the standard error of the mean of what remains is least;
             where that is at half of the series, or would be later, there is too little of it to tell.
    """
    values = np.asarray(series, dtype="float64")
    n = len(values)
    if n < 2 * _MSER:
        return WarmUp(0, n, True, f"{n} values are too few to look for a warm-up (MSER-5 wants {2 * _MSER})")
    if values.max() - values.min() <= _ROUNDOFF * abs(values.mean()):
        return WarmUp(0, n, True, f"no warm-up: all {n} values are the same")
    batches = values[: n // _MSER * _MSER].reshape(-1, _MSER).mean(axis=1)
    # Looked for in the first half alone: the means of the last few batches are close to each other by chance.
    half = len(batches) // 2
    best = int(np.argmin(_mser(batches)[: half + 1]))
    if best == half:
        cut = n // 2
        return WarmUp(
            cut, n, False, f"{cut} of {n} cut, the most that MSER-5 may: not settled, a trend may remain"
        )
    cut = best * _MSER
    return WarmUp(cut, n, True, f"{cut} of {n} cut as warm-up (MSER-5)")


def _mser(batches: np.ndarray) -> np.ndarray:
    """float64[k - 1] squared standard error of the mean without the first d, for each d."""
    # Around the mean, so that squares of large values do not swallow their differences.
    values = batches - batches.mean()
    left = len(values) - np.arange(len(values))
    sums, squares = (np.cumsum(v[::-1])[::-1] for v in (values, values**2))
    found: np.ndarray = (np.maximum(squares - sums**2 / left, 0.0) / left**2)[:-1]
    return found


# ---- intervals ------------------------------------------------------------------------------------------


def mean_interval(values: Any, level: float = LEVEL) -> Interval:
    """The mean of independent values, such as one per replication, with Student's t.

    values   float[n], none of them NaN; at least one
    """
    x = np.asarray(values, dtype="float64")
    mean = _mean(x)
    if len(x) < 2:
        return Interval(mean, None, None, level, len(x), "one replication: exact for its seed, no interval")
    half = student_t(level, len(x) - 1) * _deviation(x) / sqrt(len(x))
    how = f"Student's t over {len(x)} replications" if half else f"the same in all {len(x)} replications"
    return Interval(mean, mean - half, mean + half, level, len(x), how)


def difference_interval(ours: Any, theirs: Any, level: float = LEVEL) -> Interval:
    """The difference theirs - ours of two means of independent values that are no pairs.

    Source   Welch, Biometrika 34, 1947, with Satterthwaite's degrees of freedom
    """
    a, b = (np.asarray(v, dtype="float64") for v in (ours, theirs))
    found, count = _mean(b) - _mean(a), min(len(a), len(b))
    if count < 2:
        return Interval(found, None, None, level, count, "one replication on a side: no interval")
    of_a, of_b = _deviation(a) ** 2 / len(a), _deviation(b) ** 2 / len(b)
    if not of_a + of_b:
        return Interval(found, found, found, level, count, "the same in all replications of a side")
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    half = student_t(level, freedom) * sqrt(of_a + of_b)
    how = f"Welch's t over {len(a)} and {len(b)} replications without common seeds"
    return Interval(found, found - half, found + half, level, count, how)


def batch_means(series: Any, level: float = LEVEL) -> Interval:
    """The mean of a series whose neighbours depend on each other, such as the steps of one run.

    series   float[n] in order of time, warm-up cut already; at least one
    Returns  an interval by the means of 30, 20 or 10 batches, the most whose neighbours are not found
             correlated; none for fewer than 20 values
    Source   the widening by what correlation is left: Tafazzoli, Wilson, Lada, Steiger, INFORMS Journal on
             Computing 23(2), 2011 (Skart)
    """
    x = np.asarray(series, dtype="float64")
    mean = _mean(x)
    if len(x) < 2 * _BATCHES[-1]:
        why = f"{len(x)} values are too few for batch means ({2 * _BATCHES[-1]} wanted): no interval"
        return Interval(mean, None, None, level, len(x), why)
    if not _deviation(x):
        return Interval(mean, mean, mean, level, len(x), f"all {len(x)} values are the same")
    for count in (k for k in _BATCHES if 2 * k <= len(x)):
        size = len(x) // count
        # What does not fill a batch is left out of the spread, at the beginning, where warm-up would be.
        means = x[len(x) - size * count :].reshape(count, size).mean(axis=1)
        correlation = max(_neighbours(means), 0.0)
        apart = correlation <= _ONE_IN_20 / sqrt(count)
        if apart:
            break
    # What is left of the correlation widens the interval.
    wider = sqrt((1 + correlation) / (1 - correlation))
    half = student_t(level, count - 1) * wider * _deviation(means) / sqrt(count)
    how = f"means of {count} batches of {size}"
    if not apart:
        how += "; neighbours still depend on each other, so the interval may be too narrow: run longer"
    return Interval(mean, mean - half, mean + half, level, len(x), how)


def _neighbours(means: np.ndarray) -> float:
    """Correlation of neighbours; above _ONE_IN_20 / sqrt(k) in 1 of 20 series of k independent values."""
    around = means - means.mean()
    whole = float(around @ around)
    return float(around[1:] @ around[:-1]) / whole if whole else 0.0


def percentile_interval(values: Any, q: float, level: float = LEVEL) -> Interval:
    """A percentile of independent values, between two of them.

    values   float[n], at least one
    q        0.99 for p99
    Returns  the value interpolated linearly as everywhere; low and high are order statistics, whatever the
             distribution; none where the values are too few, with how many are needed
    Source   Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2: of n values, the number
             below the percentile is binomial
    """
    x = np.sort(np.asarray(values, dtype="float64"))
    found, n, tail = float(np.quantile(x, q)), len(x), (1 - level) / 2
    below = _binomial(n, q)
    lower = int(np.searchsorted(below, tail, side="right"))
    upper = int(np.searchsorted(below, 1 - tail, side="left")) + 1
    # lower - 1 is the last count at which the tail is small enough; ranks are counted from one.
    if lower < 1 or upper > n:
        why = f"{n} values are too few for an interval of p{q * 100:g}; {enough(q, level)} are needed"
        return Interval(found, None, None, level, n, why)
    return Interval(
        found, float(x[lower - 1]), float(x[upper - 1]), level, n,
        f"order statistics {lower} and {upper} of {n}, as if values were independent",
    )  # fmt: skip


def enough(q: float, level: float = LEVEL) -> int:
    """How many values a percentile needs before two of them enclose it with that probability."""
    tail = log((1 - level) / 2)
    return max(ceil(tail / log(q)), ceil(tail / log1p(-q)))


def _binomial(n: int, q: float) -> np.ndarray:
    """float64[n + 1] probability of at most k successes of n."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1, dtype="float64")))])
    k = np.arange(n + 1)
    return np.cumsum(np.exp(logs[n] - logs - logs[::-1] + k * log(q) + (n - k) * log1p(-q)))


def _mean(x: np.ndarray) -> float:
    # Equal values have themselves as mean, to the last bit.
    return float(x[0] + (x - x[0]).mean())


def _deviation(x: np.ndarray) -> float:
    """Standard deviation with n - 1; roundoff is none."""
    found = float((x - x[0]).std(ddof=1))
    return found if found > _ROUNDOFF * float(np.abs(x).max()) else 0.0


def steady(series: Any, level: float = LEVEL) -> dict[str, Any] | None:
    """Mean and p99 of a series without its warm-up, as JSON values: the keys of `phases.<phase>.steady`.

    series   float[n] in order of time; None is returned for an empty one
    """
    values = np.asarray(series, dtype="float64")
    if not len(values):
        return None
    cut = warm_up(values)
    rest = values[cut.cut :]
    mean, p99 = batch_means(rest, level), percentile_interval(rest, 0.99, level)
    return {
        "cut": cut.cut, "settled": cut.settled, "warm_up": cut.words,
        "mean": mean.value, "mean_half_width": mean.half_width, "mean_how": mean.how,
        "p99": p99.value, "p99_low": p99.low, "p99_high": p99.high, "p99_how": p99.how,
    }  # fmt: skip


# ---- Student's t ----------------------------------------------------------------------------------------


@cache
def student_t(level: float, freedom: float) -> float:
    """Between -t and t lies Student's t with probability `level`.

    freedom  degrees of freedom, more than 0, not only whole
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: float) -> float:
    """Probability that |T| is at most t."""
    return 1 - _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function.

    Source   its continued fraction, DLMF 8.17.22, by Lentz's method
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _MOST_ITERATIONS):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d)
            c = 1 + step / c
            found *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * found


# ---- said to people -------------------------------------------------------------------------------------

#: Digits of a value that is exact.
_EXACT = 6


def digits(value: float, half_width: float | None) -> str:
    """A value with no more digits than its interval supports: the last one printed is of the order of the
    half-width. `digits(12.3456, 0.03)` is "12.35", `digits(1234.5, 60)` is "1230".

    half_width  not negative; None or 0 where the value is exact
    """
    if not isfinite(value):
        return "-"
    if not half_width or not isfinite(half_width):
        return _significant(value, _EXACT) if not half_width else "-"
    place = _place(half_width)
    rounded = round(value, place)
    return f"{rounded + 0.0:,.{max(place, 0)}f}"


def _significant(value: float, count: int) -> str:
    """So many significant digits, without an exponent where that is readable."""
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{count}g}"
    place = count - 1 - floor(log(abs(value), 10))
    text = f"{round(value, place):,.{max(place, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def said_half_width(half_width: float) -> str:
    """A half-width, rounded up to one digit, so that what is printed still encloses."""
    place = _place(half_width)
    return f"{_rounded_up(half_width):,.{max(place, 0)}f}"


def _rounded_up(half_width: float) -> float:
    scale = 10.0 ** floor(log(half_width, 10) + 1e-12)
    return ceil(half_width / scale - 1e-9) * scale


def _place(half_width: float) -> int:
    """Decimal places whose last is of the order of the half-width, as it is printed."""
    return -floor(log(_rounded_up(half_width), 10) + 1e-9)


#: Dimension → units from large to small with their SI value, as people read them.
_UNITS: dict[str, Sequence[tuple[float, str]]] = {
    "time": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")),
    "size": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "share": ((0.01, "%"),),
    "number": ((1.0, ""),),
    "rate": ((1.0, "tokens/s"),),
}


def said_within(value: float, half_width: float | None, dimension: str) -> str:
    """A quantity and its interval in one unit: "12.35 ± 0.03 ms"; without one, to six digits.

    dimension  time, size, share (of one, said in percent), rate (tokens/s) or number
    """
    if not isfinite(value):
        return show(value, "time")
    units = _UNITS[dimension]
    largest = max(abs(value), _rounded_up(half_width) if half_width else 0.0)
    known = (one for one in units if largest >= one[0] * 0.9995)
    # Nothing is nothing in the base unit: "0 s".
    factor, unit = next(known, units[-1]) if largest else min(units, key=lambda one: abs(one[0] - 1))
    space = " " if unit and unit != "%" else ""
    if not half_width:
        return f"{digits(value / factor, None)}{space}{unit}"
    width = half_width / factor
    first = f"{digits(value / factor, width)}{unit if unit == '%' else ''}"
    return f"{first} ± {said_half_width(width)}{space}{unit}"
