"""What the numbers of a fabric imply for each other: uplinks from oversubscription, links between groups."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from clustersim.errors import ClustersimError
from clustersim.spec.hardware import UPLINK_BANDWIDTH, Dragonfly, FatTree, Nvl72, RailFatTree
from clustersim.units import show

LeafSpine: TypeAlias = FatTree | RailFatTree | Nvl72

#: How far a stated oversubscription may lie from the uplinks' own: room for 1.33, not for another number.
_ROUNDING = 0.005


class Mismatch(ClustersimError):
    """A number of a topology that does not fit to the others.

    key      of the topology table
    problem  what is wrong and what would be right
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"topology.{key}: {problem}")
        self.key = key
        self.problem = problem


class Uplinks(NamedTuple):
    """What leads up from each leaf.

    spines     above it, in each plane; 0 where leaves need none
    bandwidth  to each of them, bytes/s
    """

    spines: int
    bandwidth: float


def boxes(spec: LeafSpine) -> int:
    """Servers in all."""
    return spec.racks * spec.trays if isinstance(spec, Nvl72) else spec.servers


def boxes_per_leaf(spec: LeafSpine) -> int:
    """Servers that hang on one leaf; all of them where no spines are asked for."""
    match spec:
        case FatTree():
            return spec.servers_per_leaf
        case RailFatTree():
            return spec.servers_per_pod or spec.servers
        case Nvl72():
            return spec.trays if _has_spines(spec) else spec.racks * spec.trays


def downlink_bandwidth(spec: LeafSpine) -> float:
    """From one leaf to all its cards, in one plane, bytes/s."""
    cards = spec.server.nics if isinstance(spec, FatTree) else 1
    return boxes_per_leaf(spec) * cards * spec.server.nic_bandwidth / spec.planes


def uplinks(spec: LeafSpine) -> Uplinks:
    """Two of spines, their bandwidth and the oversubscription say the third; all three must agree.

    Raises   Mismatch where too little or too much is said
    """
    over, spines, bandwidth = spec.oversubscription, spec.spines, spec.uplink_bandwidth
    if over is None:
        return _plain(spec)
    if not spines and boxes_per_leaf(spec) >= boxes(spec):
        raise Mismatch(
            "oversubscription", "all servers share their leaves; there are no uplinks it could be about"
        )
    down = downlink_bandwidth(spec)
    if spines and bandwidth is None:
        return Uplinks(spines, down / (over * spines))
    if not spines:
        return _counted(spec, down / over)
    assert bandwidth is not None
    found = down / (spines * bandwidth) if bandwidth else 0.0
    if abs(found / over - 1) > _ROUNDING:
        raise Mismatch(
            "oversubscription",
            f"{over:g} contradicts the uplinks: {spines} spines at {show(bandwidth, 'bandwidth')} under "
            f"{show(down, 'bandwidth')} of cards give {found:.4g}; leave out one of the three",
        )
    return Uplinks(spines, bandwidth)


def _has_spines(spec: Nvl72) -> bool:
    return bool(spec.spines) or spec.oversubscription is not None


def _plain(spec: LeafSpine) -> Uplinks:
    """Without a word on oversubscription."""
    if not isinstance(spec, FatTree):
        given = spec.uplink_bandwidth
        return Uplinks(spec.spines, UPLINK_BANDWIDTH if given is None else given)
    if not spec.spines and spec.servers > spec.servers_per_leaf:
        raise Mismatch("spines", "missing key; give the spines, or oversubscription and uplink_bandwidth")
    if spec.spines and spec.uplink_bandwidth is None:
        raise Mismatch("uplink_bandwidth", "missing key; give it, or oversubscription")
    return Uplinks(spec.spines, spec.uplink_bandwidth or 0.0)


def _counted(spec: LeafSpine, up: float) -> Uplinks:
    """As many spines as links of the given bandwidth make up the bandwidth upwards.

    up   from one leaf, bytes/s
    """
    bandwidth = spec.uplink_bandwidth
    if bandwidth is None:
        if isinstance(spec, FatTree):
            raise Mismatch(
                "spines", "missing key; oversubscription needs spines or uplink_bandwidth beside it"
            )
        bandwidth = UPLINK_BANDWIDTH
    spines = round(up / bandwidth) if bandwidth else 0
    if spines < 1 or abs(spines * bandwidth / up - 1) > _ROUNDING:
        near = downlink_bandwidth(spec) / (max(spines, 1) * bandwidth) if bandwidth else 0.0
        raise Mismatch(
            "oversubscription",
            f"{spec.oversubscription:g} leaves {show(up, 'bandwidth')} upwards from a leaf, which is no "
            f"whole number of uplinks at {show(bandwidth, 'bandwidth')}; {near:.4g} is, or give spines",
        )
    return Uplinks(spines, bandwidth)


def links_per_pair(spec: Dragonfly) -> int:
    """Global links between each pair of groups.

    Raises   Mismatch where they cannot be shared evenly
    """
    others, links = spec.groups - 1, spec.routers * spec.global_links
    if others and links % others:
        near = [next(n for n in range(others, 0, -1) if links % n == 0)]
        near += [n for n in range(others + 1, min(links, 2 * others) + 1) if links % n == 0][:1]
        raise Mismatch(
            "groups",
            f"{spec.groups}: {spec.routers} routers x {spec.global_links} global_links = {links} links of a "
            f"group cannot be shared evenly among {others} others; "
            f"{' and '.join(str(n + 1) for n in near)} groups can",
        )
    return links // others if others else 0
