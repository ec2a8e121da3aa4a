"""How much faster one variant is than another, and how far that can be relied on.

Variants are compared seed by seed: both see the same random numbers, so what they have in common goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]

#: Degrees of freedom, from 1 on → how many standard errors on either side hold 95 % of a mean of so few.
#: Source: Student's t distribution, two-sided 5 % points, as tabled in any handbook of statistics.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def mean_of(figures: Sequence[Any]) -> Any:
    """Mean of numbers, or key by key of tables alike; None where one of them is None."""
    first = figures[0]
    if isinstance(first, Mapping):
        if any(one is None for one in figures):
            return None
        return {key: mean_of([one[key] for one in figures]) for key in first}
    known = [one for one in figures if one is not None]
    return fmean(known) if len(known) == len(figures) else None


def margin_of(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the values' mean; None of fewer than two."""
    if len(values) < 2:
        return None
    # Beyond the table the last entry is a little too wide, which errs on the safe side.
    wide = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
    return wide * stdev(values) / sqrt(len(values))


def gain_over(row: Row, reference: Row | None) -> dict[str, Any] | None:
    """Tokens per second more than a reference's, as a share: of each seed, their mean, and its margin.

    row, reference  with `runs`: figures per seed, or None where there are none
    Returns         mean, margin (as in `margin_of`) and each; None where no seed has both
    """
    if reference is None:
        return None
    pairs = zip(row["runs"], reference["runs"], strict=True)
    each = [
        one["tokens_per_second"] / other["tokens_per_second"] - 1 for one, other in pairs if one and other
    ]
    return {"mean": fmean(each), "margin": margin_of(each), "each": each} if each else None


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with most tokens per second, the first of equals; None if none was run."""
    ran = [row for row in rows if any(row["runs"])]
    return max(ran, key=lambda row: row["tokens_per_second"], default=None)


def most_gained(rows: Iterable[Row]) -> Row | None:
    """The row with the largest `gain`, the first of equals; None if none is known."""
    known = [row for row in rows if row["gain"] is not None]
    return max(known, key=lambda row: row["gain"]["mean"], default=None)


def verdict_on(gain: Mapping[str, Any] | None) -> str:
    """worth: the whole 95 % interval is a gain, or there is one seed and it gains; not_worth: the mean is
    none; open: a gain that is less than its margin, so that other seeds might say otherwise."""
    if gain is None or gain["mean"] <= 0:
        return "not_worth"
    return "open" if gain["margin"] is not None and gain["mean"] <= gain["margin"] else "worth"
