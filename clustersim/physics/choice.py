"""The algorithm that `auto` takes on a machine for which nobody has measured what exchanges cost."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from clustersim.physics.startup import Shape
from clustersim.plan.collectives import COLLECTIVES
from clustersim.plan.rounds import DOWN, UP, Group, Round


def quickest(kind: str, shape: Shape, size: float, among: Collection[str]) -> str:
    """The algorithm of the least time: latencies of all its rounds, and the busiest port of each.

    size    bytes as in `physics.exchanges.nominal_size`
    among   algorithms the group can do
    """
    n = shape.members
    group = Group(np.arange(n) * shape.domains // n)
    payload = {
        "all_gather": np.full((1, n), size / n),
        "reduce_scatter": np.full((1, n), size / n),
        "all_to_all": np.full((1, n, n), size / n),
    }.get(kind, np.array([size]))
    times = {
        name: sum(_seconds(one, group, shape) for one in COLLECTIVES[kind][name].rounds(group, payload))
        for name in among
    }
    return min(times, key=lambda name: times[name])


def _seconds(one: Round, group: Group, shape: Shape) -> float:
    far = group.domain[one.source] != group.domain[one.target]
    latency = np.where(far, float(shape.network_latency), float(shape.nvlink_latency))
    first = latency.copy()
    for _ in range(len(first) if one.behind is not None else 0):
        behind = np.append(first, 0.0)[one.behind].max(axis=1)
        if np.array_equal(first, latency + behind):
            break
        first = latency + behind
    busiest = 0.0
    for where, bandwidth in ((far, shape.network_bandwidth), (~far, shape.nvlink_bandwidth)):
        for ends, other in ((one.source, DOWN), (one.target, UP)):
            here = where if one.via is None else where & (one.via != other)
            carried = np.bincount(ends[here], one.size[0, here], group.n)
            busiest = max(busiest, float(carried.max()) / bandwidth)
    return one.repeat * (float(first.max(initial=0.0)) + busiest)
