"""Where a wished bound is first missed: a coarse scan, then bisection.

A search is a generator: it yields the values it wants to know about and is sent what they gave, so it
knows nothing of runs and several searches share the workers. Runs are asked for in whole rounds, the same
ones however many workers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Values that are tried first, both ends among them: more would find narrower islands, and cost runs.
_SCANNED = 5
#: Noise of draws below which values that fall do not speak against monotony.
_MONOTONE = 0.01


@dataclass(frozen=True, slots=True)
class Range:
    """What is made worse, and how far.

    low, high    the mildest and the worst value
    precision    how far the answer may be off: a share of it where `ratio`, else absolute
    ratio        whether values are halved by ratio (factors) or by difference
    """

    low: float
    high: float
    precision: float
    ratio: bool

    def between(self, one: float, other: float, share: float = 0.5) -> float:
        """The value that lies at a share of the way, rounded so that it is written in few digits."""
        if self.ratio:
            exact = math.exp((1 - share) * math.log(one) + share * math.log(other))
            return float(f"{exact:.4g}")
        return round((1 - share) * one + share * other, 4)

    def near(self, one: float, other: float) -> bool:
        """Whether two values are as close as the answer has to be."""
        return other <= one * (1 + self.precision) if self.ratio else other - one <= self.precision

    def scanned(self) -> list[float]:
        """The values that are tried first."""
        inner = [self.between(self.low, self.high, n / (_SCANNED - 1)) for n in range(1, _SCANNED - 1)]
        return [self.low, *inner, self.high]


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of a search: its value, what the bound is on there, and whether that misses it.

    value  None where the run failed or has no such metric
    """

    at: float
    value: float | None
    missed: bool
    error: str = ""


#: What is asked for, what comes back, what is found in the end.
Search = Generator[list[float], Sequence[Probe], "Found"]


@dataclass(frozen=True, slots=True)
class Found:
    """Where the bound breaks.

    verdict  breaks, never (in the range), always (already at its mildest) or failed
    kept     the last value at which the bound is kept, if any
    missed   the first at which it is missed, if any
    probes   every run, by value
    doubts   sentences on what speaks against one single breaking point
    """

    verdict: str
    kept: float | None
    missed: float | None
    probes: tuple[Probe, ...]
    doubts: tuple[str, ...] = field(default=())


def breaking_point(over: Range, most: bool = True) -> Search:
    """The smallest value in the range at which the bound is missed.

    most     whether the bound is a most, so that values are expected to rise
    Yields   values to try; is sent their probes in the same order
    """
    known: dict[float, Probe] = {}

    def learn(probes: Sequence[Probe]) -> None:
        known.update({probe.at: probe for probe in probes})

    learn((yield over.scanned()))
    while True:
        probes = [known[at] for at in sorted(known)]
        if any(probe.error for probe in probes):
            return _found("failed", None, None, probes, most)
        first = next((n for n, probe in enumerate(probes) if probe.missed), None)
        if first is None:
            return _found("never", probes[-1].at, None, probes, most)
        if first == 0:
            return _found("always", None, probes[0].at, probes, most)
        kept, missed = probes[first - 1].at, probes[first].at
        middle = over.between(kept, missed)
        if over.near(kept, missed) or not kept < middle < missed:
            return _found("breaks", kept, missed, probes, most)
        learn((yield [middle]))


def _found(
    verdict: str, kept: float | None, missed: float | None, probes: Sequence[Probe], most: bool
) -> Found:
    return Found(verdict, kept, missed, tuple(probes), tuple(_doubts(probes, missed, most)))


def _doubts(probes: Sequence[Probe], missed: float | None, most: bool) -> list[str]:
    """What was seen that a monotone cause would not show."""
    told = []
    if missed is not None:
        beyond = [probe.at for probe in probes if probe.at > missed and not probe.missed and not probe.error]
        if beyond:
            told.append(f"the bound is kept again at {_listed(beyond)}: this is the first miss, not the last")
    values = [(probe.at, probe.value) for probe in probes if probe.value is not None]
    worst = None
    for at, value in values:
        if worst is not None and _better(value, worst[1], most):
            told.append(f"not monotone: {at:g} is milder in its effect than {worst[0]:g}")
            break
        if worst is None or _better(worst[1], value, most, 0.0):
            worst = (at, value)
    return told


def _better(one: float, other: float, most: bool, noise: float = _MONOTONE) -> bool:
    return one < other * (1 - noise) if most else one > other * (1 + noise)


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def together(
    searches: Mapping[str, Search], ask: Callable[[Sequence[tuple[str, float]]], Sequence[Probe]]
) -> dict[str, Found]:
    """Drives searches side by side, a round of each at a time.

    ask      (name of the search, value) pairs → their probes, in the same order
    """
    found: dict[str, Found] = {}
    wanted = {name: next(search) for name, search in searches.items()}
    while wanted:
        pairs = [(name, at) for name, values in wanted.items() for at in values]
        answers = dict(zip(pairs, ask(pairs), strict=True))
        following = {}
        for name, values in wanted.items():
            try:
                following[name] = searches[name].send([answers[name, at] for at in values])
            except StopIteration as over:
                found[name] = over.value
        wanted = following
    return {name: found[name] for name in searches}


def as_json(found: Found) -> dict[str, Any]:
    """A search's answer as JSON values."""
    return {
        "verdict": found.verdict,
        "kept_at": found.kept,
        "missed_at": found.missed,
        "probes": [
            {"at": p.at, "value": p.value, "missed": p.missed, "error": p.error} for p in found.probes
        ],
        "doubts": list(found.doubts),
    }
