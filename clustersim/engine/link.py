"""One process per link: it owns the link's capacity over time and writes what it could have carried."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import simpy

from clustersim.engine.fabric import Fabric, Process


class Capacities:
    """Bandwidth of every link over time, for what asks later: nominal but where it was told otherwise.

    nominal  float64[K] bytes/s
    """

    def __init__(self, nominal: np.ndarray) -> None:
        self._nominal = nominal
        #: link → when it changed, s, and to what, bytes/s
        self._changes: dict[int, tuple[list[float], list[float]]] = {}

    def note(self, link: int, bandwidth: float, now: float) -> None:
        """A link has that bandwidth from now on, bytes/s."""
        times, values = self._changes.setdefault(link, ([0.0], [float(self._nominal[link])]))
        times.append(now)
        values.append(bandwidth)

    def mean(self, start: float, end: float) -> np.ndarray:
        """Mean bandwidth of every link over a time, float64[K] bytes/s."""
        if not self._changes:
            return self._nominal
        mean = self._nominal.copy()
        for link, (times, values) in self._changes.items():
            first, last = bisect_right(times, start) - 1, bisect_right(times, end) - 1
            bounds = np.array([start, *times[first + 1 : last + 1], end])
            held = np.array(values[first : last + 1])
            mean[link] = held @ np.diff(bounds) / (end - start) if end > start else held[-1]
        return mean


def link_process(
    env: simpy.Environment,
    link: int,
    nominal: float,
    changes: Iterator[tuple[float, float]],
    fabric: Fabric,
    capacities: Capacities,
    offered: np.ndarray,
    over: simpy.Event,
) -> Process:
    """Lives as long as the run.

    nominal  bandwidth at the start, bytes/s
    changes  (when, bandwidth from then on), in order of time; the last holds for ever
    capacities  are told of every change
    offered  float64[K] bytes the link could have carried; written at the end
    over     fires when the run ends
    """
    bandwidth, since, total = nominal, env.now, 0.0
    upcoming = next(changes, None)
    while upcoming is not None:
        (at, following), upcoming = upcoming, next(changes, None)
        if at > env.now:
            yield env.any_of([env.timeout(at - env.now), over])
        if over.triggered:
            break
        last = upcoming is None
        if following == bandwidth and not last:
            continue
        total += bandwidth * (env.now - since)
        bandwidth, since = following, env.now
        fabric.set_capacity(link, bandwidth, last)
        capacities.note(link, bandwidth, env.now)
    if not over.processed:
        yield over
    offered[link] = total + bandwidth * (env.now - since)
