"""What an exchange costs beside path latency and link bandwidth, and which algorithm a library takes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Fitted parameters that hold for a group."""


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

    launch    s before the first byte of the first round
    step      s added to every round and each of its repeats beside the path's latency
    wire      bytes on the wire per byte of payload, >= 1
    latency   s all rounds wait in all, path latencies included
    transfer  s the bytes take alone
    """

    launch: float
    step: float
    wire: float
    latency: float
    transfer: float


def startup(costs: Costs, kind: str, algorithm: str, shape: Shape, size: float) -> Startup:
    """Costs of one exchange. size: bytes as in `physics.exchanges.nominal_size`."""
    raise NotImplementedError


def choose(costs: Costs, kind: str, shape: Shape, size: float, among: Collection[str] | None = None) -> str:
    """The algorithm that `auto` takes among those a group can do."""
    raise NotImplementedError
