"""What an exchange costs beside path latency and link bandwidth, and which algorithm a library takes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from clustersim.plan.collectives import COLLECTIVES
from clustersim.plan.rounds import DOWN, UP, Group, Round


@dataclass(frozen=True, slots=True)
class Shape:
    """A group on a machine, as far as start-up costs and the choice of an algorithm depend on it.

    members            ranks in the group, >= 2
    domains            NVLink domains they spread over
    nvlink_bandwidth   bytes/s of a GPU, one way
    nvlink_latency     s from GPU to GPU of a domain
    network_bandwidth  bytes/s of a member's share of its domain's cards, one way
    network_latency    s from GPU to GPU of different domains
    in_switch          1 where switches can reduce and multicast, else 0
    """

    members: int
    domains: int
    nvlink_bandwidth: float
    nvlink_latency: float
    network_bandwidth: float
    network_latency: float
    in_switch: int = 0


@dataclass(frozen=True, slots=True)
class Startup:
    """What an exchange costs beside its bytes.

    launch   s before the first byte of the first round
    wire     bytes on the wire per byte of payload, >= 1
    latency  s all rounds wait in all, path latencies included
    """

    launch: float
    wire: float
    latency: float


def startup(costs: object, kind: str, algorithm: str, shape: Shape, size: float) -> Startup:
    """Costs of one exchange. size: bytes as in `physics.exchanges.nominal_size`."""
    raise NotImplementedError


def choose(costs: object, kind: str, shape: Shape, size: float, among: Collection[str] | None = None) -> str:
    """The algorithm of the least closed-form time: latencies of all steps, and the busiest port."""
    group = Group(np.arange(shape.members) * shape.domains // shape.members)
    each = size / shape.members
    payload = {
        "all_gather": np.full((1, shape.members), each),
        "reduce_scatter": np.full((1, shape.members), each),
        "all_to_all": np.full((1, shape.members, shape.members), each),
    }.get(kind, np.array([size]))
    times = {
        name: sum(_seconds(one, group, shape) for one in entry.rounds(group, payload))
        for name, entry in COLLECTIVES[kind].items()
        if among is None or name in among
    }
    return min(times, key=lambda name: times[name])


def _seconds(one: Round, group: Group, shape: Shape) -> float:
    far = group.domain[one.source] != group.domain[one.target]
    latency = np.where(far, shape.network_latency, shape.nvlink_latency)
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
