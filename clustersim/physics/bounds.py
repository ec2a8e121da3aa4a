"""Lower bounds: no simulation of a pass can be faster than these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.plan.stepgraph import StepGraph
from clustersim.spec.formats import flop_rate_of
from clustersim.spec.hardware import Gpu


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What one pass asks of the machine.

    flop         float64[S, N] useful FLOP of every rank of every stage, by the format they are done in
    bytes        float64[S, N] HBM bytes
    carried      float64[2, K] bytes over every link: on the wire, and of them those that the exchanges are
                 about; float64[2, 1] zero where nothing is exchanged
    """

    flop: Mapping[str, np.ndarray]
    bytes: np.ndarray
    carried: np.ndarray

    @property
    def all_flop(self) -> float:
        """Of all ranks, in whatever format."""
        return float(sum(amount.sum() for amount in self.flop.values()))

    def arithmetic(self, gpu: Gpu) -> np.ndarray:
        """float64[S, N] seconds that the FLOP take at the data sheet's rates."""
        found = np.zeros(self.bytes.shape)
        for fmt, amount in self.flop.items():
            found += amount / flop_rate_of(gpu, fmt)
        return found


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds that a step takes at least, each resource alone."""

    compute: float
    memory: float
    network: float


def work_of(graph: StepGraph, exchanges: Iterable[np.ndarray]) -> Work:
    """Sums a graph's operators per rank, and its exchanges per link.

    exchanges  float64[2, K] bytes over each link, one array per exchange
    """
    carried = sum(exchanges, start=np.zeros((2, 1)))
    flop: dict[str, np.ndarray] = {}
    moved = np.zeros(graph.ranks.shape)
    for op in graph.operators:
        if op.call is not None:
            flop.setdefault(op.call.format, np.zeros(graph.ranks.shape))[op.stage] += op.flop
        moved[op.stage] += op.bytes
    return Work(flop, moved, carried)


def lower_bounds(passes: Sequence[Work], gpu: Gpu, bandwidth: np.ndarray) -> Bounds:
    """Bounds of a step made of these passes (its micro-batches).

    bandwidth  float64[K] bytes/s of every link
    Returns    compute and memory: a rank works off all passes one after the other, and one pass goes
               through all stages one after the other; whichever is longer. network: all that
               the exchanges are about over the link that needs longest for it; what protocols add is
               no law of the machine
    """
    payload = sum((w.carried[1] for w in passes), start=np.zeros(1))
    return Bounds(
        compute=_serial([w.arithmetic(gpu) for w in passes]),
        memory=_serial([w.bytes for w in passes]) / gpu.memory_bandwidth,
        network=float((payload / bandwidth).max(initial=0.0)),
    )


def _serial(amounts: Sequence[np.ndarray]) -> float:
    busiest_rank = float(np.sum(amounts, axis=0).max())
    longest_pass = max(float(a.max(axis=1).sum()) for a in amounts)
    return max(busiest_rank, longest_pass)
