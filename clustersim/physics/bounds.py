"""Lower bounds: no simulation of a pass can be faster than these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.plan.stepgraph import StepGraph
from clustersim.spec.hardware import Gpu


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What one pass asks of the machine.

    flop, bytes  float64[S, N] useful FLOP and HBM bytes of every rank of every stage
    carried      float64[K] bytes over every link
    """

    flop: np.ndarray
    bytes: np.ndarray
    carried: np.ndarray


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds that a step takes at least, each resource alone.

    occupied  seconds that the busiest rank or link is occupied by it: no pipeline, however many steps
              it holds, gets through more than one step in that time
    """

    compute: float
    memory: float
    network: float
    occupied: float


def work_of(graph: StepGraph, carried: np.ndarray) -> Work:
    """Sums a graph's operators per rank; carried as in Work."""
    flop = np.zeros(graph.ranks.shape)
    moved = np.zeros(graph.ranks.shape)
    for op in graph.operators:
        flop[op.stage] += op.flop
        moved[op.stage] += op.bytes
    return Work(flop, moved, carried)


def lower_bounds(passes: Sequence[Work], gpu: Gpu, fmt: str, bandwidth: np.ndarray) -> Bounds:
    """Bounds of a step made of these passes (its micro-batches).

    bandwidth  float64[K] bytes/s of every link
    Returns    compute and memory: a rank works off all passes one after the other, and one pass goes
               through all stages one after the other; whichever is longer. network: all bytes of
               the step over the link that needs longest for them
    """
    flop, moved = [w.flop for w in passes], [w.bytes for w in passes]
    carried = np.sum([w.carried for w in passes], axis=0)
    network = float((carried / bandwidth).max(initial=0.0))
    rate = gpu.flop_rate[fmt]
    return Bounds(
        compute=max(_busiest_rank(flop), _longest_pass(flop)) / rate,
        memory=max(_busiest_rank(moved), _longest_pass(moved)) / gpu.memory_bandwidth,
        network=network,
        occupied=max(_busiest_rank(flop) / rate, _busiest_rank(moved) / gpu.memory_bandwidth, network),
    )


def _busiest_rank(amounts: Sequence[np.ndarray]) -> float:
    return float(np.sum(amounts, axis=0).max())


def _longest_pass(amounts: Sequence[np.ndarray]) -> float:
    return max(float(a.max(axis=1).sum()) for a in amounts)
