"""One process per link: it owns the link's capacity over time and writes what it could have carried."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import simpy

from clustersim.engine.fabric import Fabric, Process


def link_process(
    env: simpy.Environment,
    link: int,
    nominal: float,
    changes: Iterator[tuple[float, float]],
    fabric: Fabric,
    offered: np.ndarray,
    over: simpy.Event,
) -> Process:
    """Lives as long as the run.

    nominal  bandwidth at the start, bytes/s
    changes  (when, bandwidth from then on), in order of time; the last holds for ever
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
    if not over.processed:
        yield over
    offered[link] = total + bandwidth * (env.now - since)
