"""What an exchange costs beside its bytes, and which algorithm a library would take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.plan.collectives import COLLECTIVES
from clustersim.plan.rounds import DOWN, UP, Group, Round


@dataclass(frozen=True, slots=True)
class Shape:
    """A group as far as costs go.

    members             how many
    domains             NVLink domains they sit in
    near_bandwidth      bytes/s a member sends within its domain; inf where it has no neighbour there
    near_latency        s
    far_bandwidth       bytes/s a member sends to other domains while all do; inf where there are none
    far_latency         s
    switched            whether an NVSwitch joins the members of a domain
    """

    members: int
    domains: int
    near_bandwidth: float
    near_latency: float
    far_bandwidth: float
    far_latency: float
    switched: bool


@dataclass(frozen=True, slots=True)
class Startup:
    """What an exchange costs beside its bytes.

    launch  s before the first byte of the first round
    step    s added to every round and each of its repeats, beside the path's latency
    wire    bytes on the wire per byte of payload, at least 1
    """

    launch: float = 0.0
    step: float = 0.0
    wire: float = 1.0


def startup(costs: object, kind: str, algorithm: str, shape: Shape, size: float) -> Startup:
    """Costs of one exchange. size: bytes as in `physics.exchanges.nominal_size`."""
    return Startup()


def choose(costs: object, kind: str, shape: Shape, size: float) -> str:
    """The algorithm of the least closed-form time: latencies of all steps, and the busiest port."""
    group = Group(np.arange(shape.members) * shape.domains // shape.members)
    each = size / shape.members
    payload = {
        "all_gather": np.full((1, shape.members), each),
        "reduce_scatter": np.full((1, shape.members), each),
        "all_to_all": np.full((1, shape.members, shape.members), each),
    }.get(kind, np.array([size]))
    may = {
        name: entry
        for name, entry in COLLECTIVES[kind].items()
        if entry.needs == "anything" or (shape.domains == 1 and shape.switched)
    }
    times = {
        name: sum(_seconds(one, group, shape) for one in entry.rounds(group, payload))
        for name, entry in may.items()
    }
    return min(times, key=lambda name: times[name])


def _seconds(one: Round, group: Group, shape: Shape) -> float:
    far = group.domain[one.source] != group.domain[one.target]
    latency = np.where(far, shape.far_latency, shape.near_latency)
    first = latency.copy()
    for _ in range(len(first) if one.behind is not None else 0):
        behind = np.append(first, 0.0)[one.behind].max(axis=1)
        if np.array_equal(first, latency + behind):
            break
        first = latency + behind
    busiest = 0.0
    for where, bandwidth in ((far, shape.far_bandwidth), (~far, shape.near_bandwidth)):
        for ends, other in ((one.source, DOWN), (one.target, UP)):
            here = where if one.via is None else where & (one.via != other)
            carried = np.bincount(ends[here], one.size[0, here], group.n)
            busiest = max(busiest, float(carried.max()) / bandwidth)
    return one.repeat * (float(first.max(initial=0.0)) + busiest)
