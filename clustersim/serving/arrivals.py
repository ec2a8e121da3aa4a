"""When batches arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clustersim.errors import pick
from clustersim.seeds import stream
from clustersim.serving.request import Request
from clustersim.spec.workload import Workload

Arrivals = Callable[[int, float, np.random.Generator], np.ndarray]


def together(batches: int, interval: float, rng: np.random.Generator) -> np.ndarray:
    """All at time zero. Returns float64[batches] s."""
    return np.zeros(batches)


def uniform(batches: int, interval: float, rng: np.random.Generator) -> np.ndarray:
    """One every `interval`, the first at time zero. Returns float64[batches] s."""
    return np.arange(batches) * interval


def poisson(batches: int, interval: float, rng: np.random.Generator) -> np.ndarray:
    """Exponential gaps of mean `interval`, the first batch at time zero. Returns float64[batches] s."""
    gaps = rng.exponential(interval, batches)
    return np.asarray(np.cumsum(gaps) - gaps[0])


def requests(workload: Workload, seed: int) -> Iterator[list[Request]]:
    """The requests of every batch, in order of arrival, made as they are asked for."""
    when = pick(ARRIVALS, workload.arrivals, "workload.arrivals")
    times = when(workload.batches, workload.interval, stream(seed, "arrivals"))
    size = workload.sequences
    for batch, time in enumerate(times):
        yield [
            Request(batch * size + i, batch, float(time), workload.prompt_tokens, workload.decode_steps)
            for i in range(size)
        ]


ARRIVALS: dict[str, Arrivals] = {"together": together, "uniform": uniform, "poisson": poisson}
